"""Build the distribution; all metadata comes from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = config["DEFAULT"]


def lines(key: str) -> list[str]:
    return [line.strip() for line in settings.get(key, "").splitlines() if line.strip()]


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=settings["license"],
    keywords=settings["keywords"],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=[settings["lib_path"], f"{settings['lib_path']}.*"]),
    package_data={settings["lib_path"]: ["py.typed", "loop/*.gz", "runs/assets/*", "use/assets/*"]},
    install_requires=lines("requirements"),
    extras_require={extra: lines(f"{extra}_requirements") for extra in settings["extras"].split()},
    entry_points={
        "nbdev": [f"{settings['lib_path']} = {settings['lib_path']}._modidx:d"],
        "console_scripts": lines("console_scripts"),
    },
)
