"""Where a long run goes on from after it was stopped, by orbax."""

import json
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The last state of one run, in a folder of its own.

    Args:
      folder: made if need be. On several hosts: one that all of them see.
      about: what the run is, as JSON can write it. Another run's state is refused.
      every: steps between two checkpoints, at least.
    """

    def __init__(self, folder: pathlib.Path, about: Any, every: int):
        self._about = json.loads(json.dumps(about))
        self._every = every
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: Any, records: list[dict[str, Any]]) -> None:
        """Keeps `state` and the records so far, if the last time was long enough ago."""
        last = self._manager.latest_step() or 0
        if step - last < self._every:
            return
        beside = {"about": self._about, "records": records}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), beside=ocp.args.JsonSave(beside)
            ),
        )

    def close(self) -> None:
        self._manager.close()

    def restore(self, state: Any) -> tuple[Any, list[dict[str, Any]]]:
        """What was kept last, placed as `state` is; `state` and no records where nothing was.

        Raises:
          ValueError: where it is of another run.
        """
        step = self._manager.latest_step()
        if step is None:
            return state, []
        beside = self._manager.restore(
            step, args=ocp.args.Composite(beside=ocp.args.JsonRestore())
        ).beside
        if beside["about"] != self._about:
            raise ValueError(
                f"The checkpoint in {str(self._manager.directory)!r} is of a run with "
                f"{beside['about']}, not {self._about}: move the folder away, or pass another "
                "--out."
            )
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        found = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
        ).state
        return found, beside["records"]


def check_every(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise ValueError(
            f"`checkpoint_every` must be at least 1 step, got {steps}: leave it out for none."
        )


def remove(folder: pathlib.Path) -> None:
    """Of a run whose result is safe, and whose checkpoints are closed: nothing is kept."""
    if folder.exists():
        shutil.rmtree(folder)
