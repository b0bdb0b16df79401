"""``python -m endcap.cli``."""

from endcap.cli.main import main

if __name__ == "__main__":
    main()
