"""`python -m pagefork.http`: the process of the gateway. pagefork.server.child tells how it is started."""

from __future__ import annotations

from pagefork.http.process import main

if __name__ == "__main__":
    main()
