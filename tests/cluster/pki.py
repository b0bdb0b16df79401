"""The cluster's certificates: one authority in the cluster's own folder, made anew with each cluster."""

from __future__ import annotations

import base64
import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_VALID = datetime.timedelta(days=365)


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs certificates into ``folder``: ``<name>.crt`` and ``<name>.key`` (0600), PEM."""

    folder: Path

    @property
    def certificate(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def key(self) -> Path:
        return self.folder / "ca.key"

    def create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.key.exists() and self.certificate.exists():
            return
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("endcap-test-ca")
        signed = (
            _builder(name, name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        self.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        _write_key(self.key, key)

    def issue(self, name: str, user: str, group: str = "", addresses: tuple[str, ...] = ()) -> tuple[Path, Path]:
        """A client's certificate of ``user`` in ``group``; a server's too with ``addresses`` (names or IPs)."""
        certificate, keyfile = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        if certificate.exists() and keyfile.exists():
            return certificate, keyfile
        own = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        own_key = serialization.load_pem_private_key(self.key.read_bytes(), None)
        assert isinstance(own_key, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if addresses else [])]
        builder = (
            _builder(_name(user, group), own.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        )
        if addresses:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_address(a) for a in addresses]), critical=False
            )
        _write_key(keyfile, key)
        certificate.write_bytes(builder.sign(own_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return certificate, keyfile

    def signing_key(self, name: str) -> tuple[Path, Path]:
        """A key pair (private, public) for service accounts' tokens."""
        private, public = self.folder / f"{name}.key", self.folder / f"{name}.pub"
        if not (private.exists() and public.exists()):
            key = ec.generate_private_key(ec.SECP256R1())
            _write_key(private, key)
            public.write_bytes(
                key.public_key().public_bytes(
                    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
                )
            )
        return private, public

    def kubeconfig(self, to: Path, server: str, user: str, group: str = "") -> Path:
        """A kubeconfig (0600) for ``user``, with everything inside it."""
        certificate, key = self.issue(to.stem, user, group)
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "endcap-test",
            "clusters": [
                {
                    "name": "endcap-test",
                    "cluster": {"server": server, "certificate-authority-data": _encoded(self.certificate)},
                }
            ],
            "users": [
                {
                    "name": user,
                    "user": {"client-certificate-data": _encoded(certificate), "client-key-data": _encoded(key)},
                }
            ],
            "contexts": [{"name": "endcap-test", "context": {"cluster": "endcap-test", "user": user}}],
        }
        to.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(document, sort_keys=False)
        if not to.exists() or to.read_text() != text:
            to.touch(mode=0o600)
            to.write_text(text)
        return to


def _name(user: str, group: str = "") -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, user)]
    if group:
        parts.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
    return x509.Name(parts)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + _VALID)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _address(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _write_key(to: Path, key: ec.EllipticCurvePrivateKey) -> None:
    to.touch(mode=0o600)
    to.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _encoded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()
