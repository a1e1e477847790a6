r"""The page of a report as a browser shows it: screenshots at two widths in light and dark, and a PDF.

Trains a healthy autoencoder and one with a mistake for a few seconds (or takes saved reports), opens their pages in
headless Chromium (Debian: `apt-get install chromium`), and says where a page is wider than its window. Look at the
pictures; a machine cannot say whether a page is beautiful.

    python recipes/benchmarks/page_screenshot.py --out pages
    python recipes/benchmarks/page_screenshot.py --out pages lightning_logs/version_0
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import lightning as L

import lightning_ae as ae

WIDTHS = (390, 1400)
#: Chromium's numbers of the two colour schemes.
SCHEMES = {"dark": 0, "light": 1}


def make(folder: Path, name: str, model: L.LightningModule, epochs: int) -> Path:
    """Fit on digits; the page lies in a folder of its own."""
    L.seed_everything(0, verbose=False)
    report = ae.DiagnosticsReport(every_n_steps=2, folder=folder / name, quiet=True)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=report,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=5,
    )
    trainer.fit(model, ae.DigitsDataModule())
    print(f"{name}: {report.report.verdict}")
    return folder / name


def chromium(*arguments: str) -> str:
    """What headless Chromium writes to standard output."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise SystemExit("Chromium is not installed: apt-get install chromium")
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000")
    return subprocess.run([program, *fixed, *arguments], check=True, capture_output=True, text=True, timeout=120).stdout


def measure(page: Path, width: int) -> tuple[int, int]:
    """Width and height of the page in a window of that width, in pixels.

    A window of headless Chromium is no narrower than 500 pixels, and so the page stands in a frame; the policy that
    forbids scripts is taken out of the copy that is measured.
    """
    inner, outer = page.with_name("inner.html"), page.with_name("outer.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    script = "parent.postMessage([document.documentElement.scrollWidth,document.documentElement.scrollHeight],'*')"
    inner.write_text(text.replace("</body>", f"<script>onload=()=>{script}</script></body>"))
    outer.write_text(
        f'<iframe src="{inner.name}" style="width:{width}px;height:900px;border:0"></iframe><p id="size"></p>'
        "<script>onmessage=e=>document.getElementById('size').textContent=e.data.join('x')</script>"
    )
    found = re.search(r'id="size">(\d+)x(\d+)', chromium("--dump-dom", outer.resolve().as_uri()))
    for path in (inner, outer):
        path.unlink()
    if found is None:
        raise SystemExit(f"{page}: Chromium did not say how large it is.")
    return int(found[1]), int(found[2])


def shoot(page: Path) -> bool:
    """Take all pictures beside the page; returns whether it fits its window everywhere."""
    fits = True
    for width in WIDTHS:
        wide, high = measure(page, width)
        fits &= wide <= width
        print(f"{page}: {wide} of {width} pixels wide, {high} high{'' if wide <= width else ': TOO WIDE'}")
        for scheme, number in SCHEMES.items():
            chromium(
                f"--blink-settings=preferredColorScheme={number}",
                f"--window-size={width},{high}",
                f"--screenshot={(page.parent / f'page_{width}_{scheme}.png').resolve()}",
                page.resolve().as_uri(),
            )
    chromium(
        f"--print-to-pdf={(page.parent / 'page.pdf').resolve()}", "--no-pdf-header-footer", page.resolve().as_uri()
    )
    return fits


def main() -> None:
    """Make the pages, and open them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", type=Path, help="folders with a diagnostics.html; two are made if none")
    parser.add_argument("--out", type=Path, default=Path("pages"))
    options = parser.parse_args()
    folders = options.reports or [
        make(options.out, "healthy", ae.ConvAutoencoder((1, 8, 8), 8, loss=ae.BernoulliNLL(), lr=3e-3), 25),
        make(options.out, "too_fast", ae.MLPAutoencoder((1, 8, 8), 8, hidden=(64,) * 3, activation="relu", lr=3.0), 4),
    ]
    if not all([shoot(folder / "diagnostics.html") for folder in folders]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
