"""`python -m pagefork.server`: the process of a served engine. See child.py for how it is started."""

from __future__ import annotations

from pagefork.server.process import main

if __name__ == "__main__":
    main()
