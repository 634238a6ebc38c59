"""Many submodels trained in one job, each exactly as if it were alone.

Time goes in rounds: in each, every owner that still trains makes one step of its own on a few of its own utterances.
Which ones follows from (seed, owner, round) alone; how owners are packed into batches changes nothing but speed. So an
owner's submodel is the same in a bank of any size, after a resume in other company, and on any number of processes.

    S  rows of a bank   B  utterances   P  owners of a step
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol, final

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from manyvoice.data.collate import Collator
from manyvoice.errors import WorkError
from manyvoice.submodels.bank import Bank, Where
from manyvoice.submodels.optim import RowAdamW, owner_means
from manyvoice.train.distributed import exchange_gradients, summed
from manyvoice.train.halfway import Halfway, fits, restore
from manyvoice.train.interrupt import Interrupt
from manyvoice.types import Batch, Seconds

# losses of each utterance of a batch, one for each size that a round trains; back-propagated one after the other
LossesOf = Callable[[Bank, Batch, int], Iterator[Tensor]]


class Steps(Protocol):
    """How owners move by their gradients."""

    def step_rows(self, rows_P: Tensor, grads: Sequence[Tensor], *, scale: float = 1.0) -> None:
        """As :meth:`RowAdamW.step_rows`."""

    def state(self) -> dict[str, Tensor]:
        """As :meth:`RowAdamW.state`."""


@final
@dataclass(frozen=True, kw_only=True)
class Speech:
    """An owner's utterances, by their rows in the corpus.

    Args: adapt: it learns from these.  choose: these say when it is best.  replay: speech of others that it learns from
        as well, so as not to forget it.  lr: peak, where it differs from the schedule's.
    """

    adapt: tuple[int, ...]
    choose: tuple[int, ...]
    replay: tuple[int, ...] = ()
    lr: float | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Args:
        rounds: at most; each is a step of every owner.
        utterances: of its own in an owner's step.  replayed: of others.
        seconds: padded audio of a batch.
        lr: peak, for owners without a rate of their own; warmed up over a tenth, then a cosine to a tenth.
        every: rounds between two looks at what chooses.  patience: looks without a better one until an owner stops.
        shared_lr: of what submodels share.
    """

    rounds: int = 150
    utterances: int = 4
    replayed: int = 0
    seconds: Seconds = Seconds(60.0)
    lr: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    every: int = 10
    patience: int = 3
    shared_lr: float = 1e-3

    def rate(self, round: int) -> float:
        """Of the peak in this round."""
        warm = max(1, self.rounds // 10)
        if round < warm:
            return (round + 1) / warm
        done = (round - warm) / max(1, self.rounds - warm)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


@final
@dataclass(kw_only=True)
class Best:
    """The best an owner has been: the nats per token on what chooses, and in which round; 0 is before any step."""

    nats: float
    round: int
    history: list[tuple[int, float]] = field(default_factory=list)


def visit(seed: int, owner: str, round: int, rows: Sequence[int], count: int) -> list[int]:
    """The rows of an owner's step: ``count`` of its utterances, all before any a second time; each time reshuffled."""
    count = min(count, len(rows))
    if count == 0:
        return []
    found: list[int] = []
    for place in range(round * count, (round + 1) * count):
        turn, k = divmod(place, len(rows))
        digest = blake2b(f"{seed} {owner} {turn}".encode(), digest_size=8, person=b"visit.v1").digest()
        order = np.random.default_rng(int.from_bytes(digest, "little")).permutation(len(rows))
        found.append(rows[int(order[k])])
    return found


def packed(groups: Mapping[int, Sequence[int]], durations_N: np.ndarray, seconds: Seconds) -> list[list[int]]:
    """Owners' groups of utterances to batches of at most so many padded seconds, owners of like length together.

    Args: groups: rows of the corpus, by row of the bank.
    Returns: the bank's rows of each batch.  A group that is larger than that is a batch by itself.
    """
    longest = {row: max(float(durations_N[i]) for i in group) for row, group in groups.items()}
    order = sorted(groups, key=lambda row: (-longest[row], row))
    batches: list[list[int]] = []
    utterances, limit = 0, 0.0
    for row in order:
        size = len(groups[row])
        if not batches or (utterances + size) * limit > seconds:
            batches.append([])
            utterances, limit = 0, longest[row]
        batches[-1].append(row)
        utterances += size
    return batches


@final
class OwnerTraining:
    """Trains a bank's rows on their owners' speech.

    Args:
        bank: on the model that ``losses`` runs, whose own weights are frozen.  What its rows share is learned unless it
            is frozen as well (``requires_grad_(False)``); then each owner learns by itself.
        speech: of each of the bank's owners, in order.
        collator: of the corpus that the speech names; its augmentation follows from (utterance, round).
        losses: what training minimises.  nats: the loss that chooses, of each utterance, without gradients.
        accelerator: for methods that share tensors, whose gradients the processes add up.
    Attributes:
        optimizer: of what is the owners' own; before the run another may take its place.
        lost: rows whose loss was not finite, and in which round.
    """

    def __init__(
        self,
        bank: Bank,
        speech: Sequence[Speech],
        collator: Collator,
        losses: LossesOf,
        nats: Callable[[Bank, Batch], Tensor],
        schedule: Schedule,
        *,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.bank, self.speech, self.collator = bank, list(speech), collator
        self.losses, self.nats, self.schedule, self.seed = losses, nats, schedule, seed
        rates = [schedule.lr if said.lr is None else said.lr for said in speech]
        self.optimizer: Steps = RowAdamW(
            bank.parameters(),
            torch.tensor([0.0, *rates]),
            weight_decay=schedule.weight_decay,
            clip=schedule.clip,
        )
        shared = [p for p in bank.shared.values() if p.requires_grad]
        self.shared = torch.optim.AdamW(shared, lr=schedule.shared_lr, weight_decay=0.0) if shared else None
        self.accelerator = accelerator
        self.active = set(range(1, len(bank)))
        self.best: dict[int, Best] = {}
        self.lost: dict[int, int] = {}
        self._together = Best(nats=math.inf, round=0)
        # the best rows so far; of what is shared as well where it is learned
        self._kept = {where: p.detach().clone() for where, p in self._learned().items()}

    def run(
        self, progress: Callable[[int, int, int], None] | None = None, halfway: Halfway | None = None
    ) -> dict[int, Best]:
        """Train until all owners have stopped or the rounds are over; each row is then the best it has been.

        Args: progress: told of (round, rounds, owners still training).  halfway: where the run is kept now and then and
            when it is stopped, and goes on from, bit for bit; whoever gives it removes it.
        Raises: WorkError if a loss is not finite where tensors are shared; KeyboardInterrupt after the round in hand.
        """
        begun = self._resumed(halfway)
        if begun == 0:
            self._look(0)
        with nullcontext() if halfway is None else Interrupt() as interrupt:
            for round in range(begun, self.schedule.rounds):
                if self._over():
                    break
                self._round(round)
                done = round + 1
                if done % self.schedule.every == 0 or done == self.schedule.rounds:
                    self._look(done)
                self._keep(halfway, done, stopped=interrupt is not None and interrupt.asked is not None)
                if progress is not None:
                    progress(done, self.schedule.rounds, len(self.active))
        with torch.no_grad():
            for where, p in self._learned().items():
                p.copy_(self._kept[where])
        return self.best

    def _learned(self) -> dict[Where, nn.Parameter]:
        return self.bank.tensors if self.shared is None else self.bank.tensors | self.bank.shared

    def _state(self) -> dict[str, Tensor]:
        """All tensors that a round changes, themselves."""
        found: dict[str, Tensor] = {f"now/{key}/{part}": p for (key, part), p in self._learned().items()}
        found |= {f"kept/{key}/{part}": t for (key, part), t in self._kept.items()}
        found |= {f"own moments/{name}": t for name, t in self.optimizer.state().items()}
        for k, p in enumerate(self.shared.param_groups[0]["params"] if self.shared is not None else ()):
            assert self.shared is not None
            moments = self.shared.state[p]
            if not moments:  # as it makes them itself at its first step
                moments |= {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
            found |= {f"shared moments/{k}/{name}": t for name, t in moments.items()}
        return found

    def _keep(self, halfway: Halfway | None, done: int, *, stopped: bool) -> None:
        if halfway is None:
            return
        # all processes together, or they could not go on together
        stopping = self._all(stopped) > 0
        if not stopping and self._all(halfway.due()) == 0:
            return
        best = {row: [b.nats, b.round, b.history] for row, b in self.best.items()}
        together = [self._together.nats, self._together.round]
        told = {"done": done, "active": sorted(self.active), "lost": self.lost, "best": best, "together": together}
        halfway.write(self._state(), told)
        if stopping:
            raise KeyboardInterrupt

    def _resumed(self, halfway: Halfway | None) -> int:
        """The rounds that another run has done, all processes the same; its state is taken over."""
        if halfway is None:
            return 0
        state, found = self._state(), halfway.read()
        done = found[1]["done"] if found is not None and fits(state, found[0]) else 0
        if self._all(done) ** 2 != self._all(1) * self._all(done**2) or found is None or done == 0:
            return 0
        tensors, told = found
        restore(state, tensors)
        self.active, self.lost = set(told["active"]), {int(row): n for row, n in told["lost"].items()}
        self._together = Best(nats=told["together"][0], round=told["together"][1])
        self.best = {
            int(row): Best(nats=nats, round=round, history=[(r, n) for r, n in history])
            for row, (nats, round, history) in told["best"].items()
        }
        return int(done)

    def _over(self) -> bool:
        return not self.active if self.shared is None else self._all(len(self.active)) == 0

    def _all(self, value: float) -> float:
        """The sum over all processes."""
        if self.accelerator is None:
            return value
        return float(summed(self.accelerator, torch.tensor([value], dtype=torch.float64))[0])

    def _round(self, round: int) -> None:
        groups = {row: self._group(row, round) for row in sorted(self.active)}
        batches = packed(groups, self.collator.corpus.durations_N, self.schedule.seconds)
        steps = len(batches)
        if self.shared is not None and self.accelerator is not None:
            # all processes exchange equally often; one that is through has nothing to add
            counts = torch.zeros(self.accelerator.num_processes, dtype=torch.float64)
            counts[self.accelerator.process_index] = steps
            steps = int(summed(self.accelerator, counts).max())
        for k in range(steps):
            rows = batches[k] if k < len(batches) else []
            self._step(rows, groups, round)

    def _group(self, row: int, round: int) -> list[int]:
        owner, said = self.bank.owners[row - 1], self.speech[row - 1]
        own = visit(self.seed, owner, round, said.adapt, self.schedule.utterances)
        return own + visit(self.seed, owner, round, said.replay, self.schedule.replayed)

    def _step(self, rows: Sequence[int], groups: Mapping[int, Sequence[int]], round: int) -> None:
        rate = self.schedule.rate(round)
        rows_P = torch.tensor(list(rows), dtype=torch.int64)
        if rows:
            few = self.bank.leaves(rows_P)
            batch = self._batch(rows, groups, round)
            for loss_B in self.losses(few, batch, round):
                _, means_P = _per_token(loss_B, batch)
                self._see(rows, means_P, round)
                means_P[means_P.isfinite()].sum().backward()
            grads = [torch.zeros_like(t[1:]) if t.grad is None else t.grad[1:] for t in few.parameters()]
            sound = torch.tensor([row in self.active for row in rows])
            self.optimizer.step_rows(rows_P[sound], [g[sound.to(g.device)] for g in grads], scale=rate)
        if self.shared is not None:
            self._step_shared(len(rows), rate)

    def _see(self, rows: Sequence[int], means_P: Tensor, round: int) -> None:
        """Owners whose loss is no number stop, and are what they were at their best; the others know nothing of it.

        Raises: WorkError where they share tensors.
        """
        bad = [row for row, fine in zip(rows, means_P.isfinite().tolist(), strict=True) if not fine]
        self.active.difference_update(bad)
        self.lost |= dict.fromkeys(bad, round)
        if bad and self.shared is not None:
            raise self._not_finite(bad)

    def raise_if_all_lost(self) -> None:
        """WorkError if no owner's loss stayed finite; whoever knows that these owners are all there are asks."""
        if len(self.lost) == len(self.bank) - 1:
            raise self._not_finite(sorted(self.lost))

    def _not_finite(self, rows: Sequence[int]) -> WorkError:
        names = ", ".join(" ".join(self.bank.owners[row - 1].split("\n")) for row in rows[:5])
        return WorkError(
            f"the loss of {names} is not finite in round {min(self.lost[row] for row in rows)}; try a lower learning "
            "rate, or look at these speakers' utterances"
        )

    def _step_shared(self, owners: int, rate: float) -> None:
        """The mean over the owners of the step, on all processes."""
        assert self.shared is not None
        parameters = list(self.bank.shared.values())
        everyone = self._all(owners)
        if self.accelerator is not None:
            exchange_gradients(self.accelerator, parameters)
        for p in parameters:
            if p.grad is not None:
                p.grad /= max(1.0, everyone)
        torch.nn.utils.clip_grad_norm_(parameters, self.schedule.clip)
        for group in self.shared.param_groups:
            group["lr"] = rate * self.schedule.shared_lr
        self.shared.step()
        self.shared.zero_grad(set_to_none=True)

    def _batch(self, rows: Sequence[int], groups: Mapping[int, Sequence[int]], round: int) -> Batch:
        indices = [i for row in rows for i in groups[row]]
        place_B = [k for k, row in enumerate(rows, start=1) for _ in groups[row]]
        model = next(iter(self.bank.tensors.values()))
        return self.collator(indices, round).owned(torch.tensor(place_B)).to(model.device, model.dtype)

    @torch.no_grad()
    def _look(self, round: int) -> None:
        """Nats per token of every active owner on what chooses; the best so far is kept, who waits too long stops."""
        found = self.nats_of({row: self.speech[row - 1].choose for row in sorted(self.active)})
        for row, nats in found.items():
            best = self.best.setdefault(row, Best(nats=math.inf, round=0))
            best.history.append((round, nats))
            if nats < best.nats:
                best.nats, best.round = nats, round
                if self.shared is None:
                    for where, p in self.bank.tensors.items():
                        self._kept[where][row] = p[row]
            elif self.shared is None and self._late(best, round):
                self.active.discard(row)
        if self.shared is not None:
            self._look_together(found, round)

    def _look_together(self, found: Mapping[int, float], round: int) -> None:
        """Where owners share tensors they are best together, by the mean over all of them, and stop together."""
        mean = self._all(math.fsum(found.values())) / max(1.0, self._all(len(found)))
        if mean < self._together.nats:
            self._together.nats, self._together.round = mean, round
            for where, p in self._learned().items():
                self._kept[where].copy_(p)
        elif self._late(self._together, round):
            self.active.clear()

    def _late(self, best: Best, round: int) -> bool:
        return round - best.round >= self.schedule.patience * self.schedule.every

    @torch.no_grad()
    def nats_of(self, groups: Mapping[int, Sequence[int]]) -> dict[int, float]:
        """Nats per token of rows of the bank, each on its utterances, in batches of many."""
        found: dict[int, float] = {}
        plain = Collator(self.collator.corpus, self.collator.features, self.collator.tokens)
        first = next(iter(self.bank.tensors.values()))
        for rows in packed(groups, self.collator.corpus.durations_N, Seconds(4 * self.schedule.seconds)):
            indices = [i for row in rows for i in groups[row]]
            owner_B = torch.tensor([row for row in rows for _ in groups[row]])
            batch = plain(indices).owned(owner_B).to(first.device, first.dtype)
            rows_P, means_P = _per_token(self.nats(self.bank, batch), batch)
            found |= dict(zip(rows_P.tolist(), means_P.tolist(), strict=True))
        return found


def _per_token(loss_B: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows present and each one's nats per token."""
    tokens_B = batch.token_len_B.clamp(min=1)
    return owner_means(loss_B / tokens_B, batch.owner_B, tokens_B)
