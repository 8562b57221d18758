"""Updates that are skipped, for the sake of the weights, and when there are too many of them.

    gradient norm ─> Skips.judge: finite? 0? many times what is usual? ─> 1.0 or 0.0 on the device ─> `optim.step_unless`

No batch has a gradient of 0: it was lost on its way, as by a compiler's mistake, and AdamW would only decay the weights. One that
is many times as large as those before it is clipped to their size, but its direction is of a broken batch. The norm is global,
so that all ranks judge alike. Nothing here waits for the device.
"""

from typing import Any

import torch
from torch import Tensor

WINDOW = 128
"""A norm is compared with the median of so many before it, of those that were taken (steps)."""
LEAST = 64
"""There must be so many of them: at the start of a run norms fall fast (steps)."""
_MAKE_UP = 10
"""So many steps that update make up for one that did not (steps)."""


class Skips:
    """The window of norms, and counts; scalars are tensors of shape () on the device."""

    def __init__(self, ratio: float, most: int, device: torch.device, saved: dict[str, Any] | None = None):
        """ratio: `optim.skip_grad_norm_above`. most: `train.max_skipped_steps`. saved: what `state` gave; None: a new run.

        A run that has ended because there were too many begins to count anew.
        """
        saved = saved or {"total": 0, "tally": 0, "grad_norms": []}
        self._ratio, self._most = ratio, most
        norms = [float("nan")] * (WINDOW - len(saved["grad_norms"])) + saved["grad_norms"]
        self.grad_norms = torch.tensor(norms, dtype=torch.float32, device=device)
        """The last norms that were taken, (WINDOW,), the newest last; NaN where there are none yet."""
        self.total = torch.full((), float(saved["total"]), device=device)
        """Updates of the run that were skipped."""
        tally = saved["tally"] if saved["tally"] < most * _MAKE_UP else 0
        self._tally = torch.full((), float(tally), device=device)
        self.too_many = torch.zeros((), device=device)
        """1.0 once `most` were skipped in a row, or with too few updates between; else 0.0."""

    def judge(self, grad_norm: Tensor) -> Tensor:
        """Whether the update with this gradient norm, (), is to be skipped: 1.0, else 0.0, (), on the device."""
        grad_norm = grad_norm.detach().to(self.grad_norms.device)
        usable = torch.isfinite(grad_norm) & (grad_norm > 0)
        if self._ratio:
            known = self.grad_norms.isfinite().sum()
            middle = ((known - 1) // 2).clamp(min=0).view(1)
            median = self.grad_norms.sort().values.index_select(0, middle).view(())  # NaN is sorted behind all
            usable &= ~((known >= LEAST) & (grad_norm > self._ratio * median))
        newer = torch.cat((self.grad_norms[1:], grad_norm.view(1)))
        self.grad_norms = torch.where(usable, newer, self.grad_norms)
        tally = torch.where(usable, self._tally - 1, self._tally + _MAKE_UP)
        self._tally = tally.clamp(0, self._most * _MAKE_UP)
        self.too_many = self.too_many.maximum((self._tally >= self._most * _MAKE_UP).float())
        skipped = (~usable).float()
        self.total += skipped
        return skipped

    def state(self) -> dict[str, Any]:
        """For state.json: exact, so that a resume judges alike. Waits for the device."""
        norms = self.grad_norms[self.grad_norms.isfinite()].tolist()
        return {"total": int(self.total), "tally": int(self._tally), "grad_norms": norms}
