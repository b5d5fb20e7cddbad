"""README.md from nbs/index.ipynb, with the outputs saved in it: `python tools/readme.py [--check]`.

Figures go to nbs/images/index_*; links are made relative to the top of the repository. `--check` writes nothing and
exits with 1 if README.md or a figure is not what the notebook gives.
"""
import argparse, os, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = Path("nbs/images")
NOTE = "<!-- Made from nbs/index.ipynb by `make notebooks`: edit that, not this. -->\n\n"
HOME = "https://github.com/gated-symile/gated_symile"
BADGES = " ".join(f"[![{name}]({HOME}/actions/workflows/{name}.yaml/badge.svg)]({to})" for name, to in
                  [("test", f"{HOME}/actions/workflows/test.yaml"),
                   ("docs", "https://gated-symile.github.io/gated_symile")])
LINK = re.compile(r'(\]\(|src="|href=")(?![a-z][a-z0-9+.-]*:|#|/|nbs/)', re.I)
OPTION = re.compile(r"^#\| *([\w-]+):? *(.*)\n?", re.M)


def shown(cell):
    "The cell as a reader of the page should see it, or None: nbdev's and Quarto's `#|` options obeyed and taken out."
    if cell.cell_type != "code": return cell
    options = dict(OPTION.findall(cell.source))
    if {"hide", "export", "exporti", "default_exp"} & options.keys() or options.get("include") == "false": return None
    cell.source = OPTION.sub("", cell.source).strip()
    if options.get("echo") == "false": cell.source = ""
    if options.get("output") == "false": cell.outputs = []
    return cell


def readme():
    "The text of README.md, and the bytes of each figure by its path."
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    nb = nbformat.read(ROOT/"nbs/index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}                       # cleaning removes it
    alts = [alt.strip('"') for cell in nb.cells for name, alt in OPTION.findall(cell.source) if name == "fig-alt"]
    nb.cells = [cell for cell in map(shown, nb.cells) if cell is not None]
    names = str(FIGURES/"index_{cell_index}_{index}{extension}")
    exporter = MarkdownExporter(config=Config(ExtractOutputPreprocessor=dict(output_filename_template=names)))
    text, resources = exporter.from_notebook_node(nb)
    text = re.sub(r"<style.*?</style>\s*", "", text, flags=re.S)            # of pandas tables: GitHub would not use it
    # what is left of a cell whose code is not shown
    text = re.sub(r"```python\s*```\n*", "", text)
    text = re.sub(r"^[ \t]*!\[(?:png|svg|jpeg)\]\(", lambda m: f"![{alts.pop(0) if alts else 'Figure'}](", text,
                  flags=re.M)
    # code is no link
    text = "".join(part if part.startswith("```") else LINK.sub(r"\1nbs/", part)
                   for part in re.split(r"(```.*?```)", text, flags=re.S))
    text = text.strip().replace("\n", f"\n\n{BADGES}\n", 1)                    # below the title
    return NOTE + re.sub(r"\n\s*\n[ \t]*(?=\n)", "\n", text) + "\n", {Path(k): v
                                                                      for k, v in resources["outputs"].items()}


def main(check=False):
    text, figures = readme()
    wanted = {Path("README.md"): text.encode(), **figures}
    stale = [p for p in sorted(FIGURES.glob("index_*")) if p not in wanted]
    wrong = [p for p, content in wanted.items() if not p.exists() or p.read_bytes() != content] + stale
    if check:
        if wrong: print("not what nbs/index.ipynb gives (run `make notebooks`):", *wrong)
        return bool(wrong)
    FIGURES.mkdir(exist_ok=True)
    for p in stale: p.unlink()
    for p, content in wanted.items(): p.write_bytes(content)


if __name__ == "__main__":
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something differs")
    sys.exit(main(parser.parse_args().check))
