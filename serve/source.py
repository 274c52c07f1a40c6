"""What `twotower serve` serves: a bundle, a folder of bundles, or a rendered model repository."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.errors import UserError
from twotower.export.bundle import Bundle, bundle_versions, read_bundle
from twotower.export.manifest import MANIFEST, REMEDY
from twotower.serve.config import ServeConfig
from twotower.serve.rendered import REMEDY as RENDER_AGAIN
from twotower.serve.rendered import is_repository, read_rendered, version_directory
from twotower.serve.rollout import chosen_bundle

BUNDLE, FOLDER, REPOSITORY = "bundle", "folder", "repository"


@dataclass(frozen=True)
class Source:
    """Where what is served lies.

    Attributes:
        path: its directory.
        kind: bundle, folder (of bundles named by their versions) or repository.
    """

    path: Path
    kind: str

    @property
    def _remedy(self) -> str:
        return RENDER_AGAIN if self.kind == REPOSITORY else REMEDY

    def version(self, work_dir: Path) -> Path:
        """Return the directory of the version that a server starting in `work_dir` serves.

        Raises:
            UserError: as `chosen_bundle` and `version_directory`.
        """
        if self.kind == FOLDER:
            return chosen_bundle(self.path, work_dir)
        return version_directory(self.path) if self.kind == REPOSITORY else self.path

    def settings(self, work_dir: Path) -> dict[str, Any]:
        """Return the section `serve` of the job that made that version.

        What it says is trusted only once `read` has proven the version whole.

        Raises:
            UserError: when there is no such version, or it is no whole one.
        """
        folder = self.version(work_dir)
        if self.kind != REPOSITORY:
            read_bundle(folder, verify=False)
        file = folder / "job.json"
        try:
            return dict(json.loads(file.read_text()).get("serve", {}))
        except FileNotFoundError:
            raise UserError(f"{file}: missing: {self._remedy}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: damaged ({error}): {self._remedy}") from None

    def read(self, config: ServeConfig, work_dir: Path) -> Bundle:
        """Read that version whole.

        Raises:
            UserError: when it is damaged, or not signed where `config` demands it.
        """
        if self.kind == REPOSITORY:
            return read_rendered(self.path, config)
        return read_bundle(self.version(work_dir), signed_by=config.require_signature)


def find_source(path: Path) -> Source:
    """Return what lies at `path`.

    Raises:
        UserError: when it is nothing that can be served.
    """
    if (path / MANIFEST).is_file():
        return Source(path, BUNDLE)
    if bundle_versions(path):
        return Source(path, FOLDER)
    if is_repository(path):
        return Source(path, REPOSITORY)
    raise UserError(
        f"{path}: {'nothing to serve here' if path.is_dir() else 'no such folder'}: name a bundle "
        f"(which holds {MANIFEST}), a folder of bundles named by their versions, or a model "
        "repository of `twotower render --target=cpu`"
    )
