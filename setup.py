"Packaging, read from settings.ini, so that every fact about the project stands in one place."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

# On PyPI, links have to name the repository.
readme = (here/"README.md").read_text(encoding="utf-8") if (here/"README.md").exists() else ""
for link, place in (("](nbs/images/", f"{cfg['git_url']}/raw/{cfg['branch']}"),
                    ("](nbs/", f"{cfg['git_url']}/blob/{cfg['branch']}")):
    readme = readme.replace(link, f"]({place}/{link[2:]}")

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["gated_symile", "gated_symile.*"]),
    package_data={"gated_symile": ["py.typed", "data/*.npz", "data/*.md"]},
    python_requires=f">={cfg['min_python']}",
    entry_points={"nbdev": ["gated_symile = gated_symile._modidx:d"]},      # where nbdev finds a name's source and page
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split()
                    for extra in ("imaging", "tables", "text", "dev", "sweep")},
    long_description=readme,
    long_description_content_type="text/markdown",
)
