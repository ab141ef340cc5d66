"""What pyproject.toml cannot say: the clone's notebooks and configs are part of the wheel, for `kd init`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class WithProject(build_py):
    """The package, and in kdlib/project/ what `kd init` copies."""

    def run(self) -> None:
        super().run()
        project = Path(self.build_lib, "kdlib", "project")
        for folder, pattern in (("notebooks", "*.ipynb"), ("configs", "*.y*ml"), ("configs", "*.jsonl")):
            for file in sorted((ROOT / folder).glob(pattern)):
                (project / folder).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, project / folder / file.name)


setup(cmdclass={"build_py": WithProject})
