"""A run's report as people see it: desktop and phone, light and dark, in headless Chromium.

Run with ``python tests/benchmarks/screenshots.py RUN OUT_DIR [--browser chromium]``: writes four png files,
report-{desktop,phone}-{light,dark}.png. Nothing is fetched: the page is one file.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

#: Width and height in CSS pixels, and device pixels to one of them.
SCREENS = {"desktop": (1200, 1500, 1), "phone": (390, 1800, 2)}
#: Chromium's numbers for the reader's choice of colours.
COLOURS = {"light": 1, "dark": 0}


def main() -> None:
    """Take the four pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder with report.html")
    parser.add_argument("out", type=Path, help="where the pictures go")
    parser.add_argument("--browser", default="chromium", help="Chromium's command")
    given = parser.parse_args()
    page, browser = given.run / "report.html", shutil.which(given.browser)
    if browser is None or not page.is_file():
        missing = given.browser if browser is None else page
        raise SystemExit(f"{missing}: not found; name a browser with --browser, and a finished run.")
    given.out.mkdir(parents=True, exist_ok=True)
    for screen, (width, height, scale) in SCREENS.items():
        for colours, number in COLOURS.items():
            target = given.out.resolve() / f"report-{screen}-{colours}.png"
            with tempfile.TemporaryDirectory() as profile:
                subprocess.run(
                    [
                        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                        f"--user-data-dir={profile}",
                        f"--window-size={width},{height}",
                        f"--force-device-scale-factor={scale}",
                        f"--blink-settings=preferredColorScheme={number}",
                        f"--screenshot={target}",
                        page.resolve().as_uri(),
                    ],
                    check=True,
                    capture_output=True,
                    timeout=120,
                )
            print(target)


if __name__ == "__main__":
    main()
