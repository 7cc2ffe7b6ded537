"""Takes the screenshots of the page; `python docs/pictures.py` writes docs/screenshots/.

It needs playwright and a Chromium (`CHROMIUM`, else /usr/bin/chromium). The page is served from
this process on a free port of the loopback address.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from time import sleep

import uvicorn
from playwright.sync_api import sync_playwright

from web.app import create_app

FOLDER = Path(__file__).resolve().parent / "screenshots"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
STATE = (
    "/?model=meta-llama%2FLlama-3.1-8B&gpu=rtx-4090&method=qlora&activation-checkpointing=full"
    "&micro-batch-size=2"
)
SHOTS = {
    "page-light": ({"width": 1280, "height": 1000}, "light"),
    "page-dark": ({"width": 1280, "height": 1000}, "dark"),
    "page-small": ({"width": 390, "height": 844}, "light"),
}


def main() -> int:
    """Serve the page and take every picture of it."""
    if not Path(CHROMIUM).exists():
        print(f"there is no {CHROMIUM}; name a Chromium in CHROMIUM", file=sys.stderr)
        return 2
    server = uvicorn.Server(uvicorn.Config(create_app(), port=0, log_level="error", ws="none"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        sleep(0.05)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    # Chromium's own sandbox does not start in a container that runs as root.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        for name, (size, scheme) in SHOTS.items():
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(address + STATE, wait_until="networkidle")
            page.screenshot(path=FOLDER / f"{name}.png")
            print(f"written: docs/screenshots/{name}.png")
        browser.close()
    server.should_exit = True
    return 0


if __name__ == "__main__":
    sys.exit(main())
