"""``python -m serving.operator``: one replica. Settings come from the environment; SIGTERM ends it in order."""

from __future__ import annotations

import sys

from endcap.errors import EndcapError


def main() -> None:
    from serving.operator.kserve import KServeOutfit
    from serving.operator.logs import set_up_logs
    from serving.operator.run import Operator, serve
    from serving.operator.settings import settings_from
    from serving.targets.kserve import open_cluster

    try:
        settings = settings_from()
        set_up_logs(settings.log_level)
        serve(Operator(open_cluster(), lambda cluster: KServeOutfit(cluster, settings), settings))
    except EndcapError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
