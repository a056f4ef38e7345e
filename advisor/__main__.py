"""``python -m advisor``: the command, for environments whose scripts are not on the path."""

from __future__ import annotations

from advisor.cli.main import main

if __name__ == "__main__":
    main()
