"""ZipAR (He et al. 2024, arXiv 2412.04062): rows of a raster model's picture decoded side by side, without training.

    tokens = generate_zipar(model, states, mask, window=8, guidance_scale=7.5, seeds=[0, 1])

The first row is decoded alone. From then on a row starts once the row above has `window` tokens, and every row that has
started advances by one token a pass: `2 w + (h - 2) window` passes for h x w tokens. In raster order a row's first token
is predicted from the last token of the row above, which does not exist yet when the row starts: the newest token of the
row above that one, in most cases the one right above the missing one, stands in for it, at its position, and its keys
and values are replaced when the real one has been decoded.

A token attends to the prefix and to what has been decoded of its own row up to itself and of the rows above. With a
window of a whole row this is raster decoding, token for token.

With `adaptive` windows a row's first token is a proposal at first. After one more token of the row above it is predicted
again; it is accepted with probability min(1, p_new / q), q being what it was drawn from, else drawn anew from what
p_new has more than q (Leviathan et al. 2023, arXiv 2211.17192), and proposed again, at the latest until the row above is
complete. Pictures then differ in their passes and are decoded one after the other.

Shape suffixes: B batch, P prefix, n tokens of one pass, S places of the cache, V vocabulary, N grid tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.model import NAR
from t2i.sampling import Callback, Sampler, trimmed


def passes_needed(rows: int, columns: int, window: int) -> int:
    """Passes of a picture with a fixed window, that of the prefix included."""
    return columns if rows == 1 else 2 * columns + (rows - 2) * min(window, columns)


@dataclass
class _Proposal:
    """A first token of a row that is not accepted yet, and the scores [1, 1, V] that it was drawn by."""

    token: Tensor
    scores: Tensor


class _Decoder:
    """State of one batch: what is decoded, where it is in the cache, which rows are open."""

    def __init__(
        self, model: NAR, sampler: Sampler, window: int, adaptive: bool, condition: Tensor, mask: Tensor | None
    ) -> None:
        self.model, self.sampler, self.adaptive = model, sampler, adaptive
        self.rows, self.columns = model.config.grid
        self.window = min(window, self.columns)
        logits, self.cache, self.prefix_mask = model.prefill(condition, mask, guided=sampler.guided)
        self.prefix = self.cache.length
        self.device = logits.device
        self.tokens_BN = torch.full((len(condition), model.n_tokens), -1, dtype=torch.int64, device=self.device)
        self.decoded = [0] * self.rows  # tokens of each row
        self.fresh: list[int] = []  # positions decoded in the last pass, which have not been inputs yet
        self.places: dict[int, int] = {}  # of positions in the cache, in order
        self.proposals: dict[int, _Proposal] = {}
        self._write({0: self._scores(logits)})

    @property
    def done(self) -> bool:
        return sum(self.decoded) == self.model.n_tokens

    def advance(self) -> None:
        """One pass: everything decoded in the last one goes in, and the next token of each open row comes out."""
        # Inputs: position -> position that is predicted from it, or None.
        inputs: dict[int, int | None] = {position: self._following(position) for position in self.fresh}
        stand_ins = [row for row in range(1, self.rows) if self._waits_for(row)]
        last = {row: row * self.columns - 1 for row in stand_ins}
        tokens = [self.tokens_BN[:, position] for position in inputs]
        tokens += [self.tokens_BN[:, (row - 2) * self.columns + self.decoded[row - 2] - 1] for row in stand_ins]
        positions = [*inputs, *last.values()]
        targets = [*inputs.values(), *(row * self.columns for row in stand_ins)]
        # What predicts nothing goes first, so that the rest is one slice.
        by_use = sorted(range(len(positions)), key=lambda i: targets[i] is not None)
        wanted = slice(targets.count(None), None)
        scores = self._run(torch.stack([tokens[i] for i in by_use], 1), [positions[i] for i in by_use], wanted)
        self._write({target: scores[:, i] for i, n in enumerate(by_use[wanted]) if (target := targets[n]) is not None})

    def _following(self, position: int) -> int | None:
        """The position that a decoded token predicts, if that has not been decoded yet."""
        row, column = divmod(position + 1, self.columns)
        return position + 1 if row < self.rows and self.decoded[row] == column else None

    def _waits_for(self, row: int) -> bool:
        """Whether a row starts in this pass from a stand-in."""
        above = self.decoded[row - 1]
        return self.decoded[row] == 0 and row > 1 and self.window <= above < self.columns

    def _run(self, tokens_Bn: Tensor, positions: list[int], wanted: slice) -> Tensor:
        """Scores [B, n', V] from a pass of these inputs; each takes its position's place in the cache or a new one."""
        places = [self.places.setdefault(position, self.prefix + len(self.places)) for position in positions]
        self.cache.places = torch.tensor(places, device=self.device)
        self.cache.length = self.prefix + len(self.places)
        positions_n = torch.tensor(positions, device=self.device)
        # In raster order what is above or to the left comes first.
        allowed_nS = torch.tensor(list(self.places), device=self.device) <= positions_n[:, None]
        mask = F.pad(allowed_nS, (self.prefix, 0), value=True)[None, None]
        if self.prefix_mask is not None:
            mask = mask & F.pad(self.prefix_mask, (0, len(self.places)), value=True)
        if self.sampler.guided:
            tokens_Bn = torch.cat([tokens_Bn, tokens_Bn])
        logits = self.model.step_anywhere(tokens_Bn, positions_n, mask, self.cache, wanted)
        return self._scores(logits)

    def _scores(self, logits: Tensor) -> Tensor:
        return self.sampler.scores(logits, self.sampler.guided)

    def _write(self, scores: dict[int, Tensor]) -> None:
        """Draw a token for each position from its scores [B, 1, V] or [B, V]."""
        self.fresh = []
        complete = [count == self.columns for count in self.decoded]
        stacked_BnV = torch.stack([one.flatten(1) for one in scores.values()], 1)
        drawn_Bn = self.sampler.draw(stacked_BnV)
        for n, position in enumerate(scores):
            row, column = divmod(position, self.columns)
            token_B = drawn_Bn[:, n]
            if self.adaptive and column == 0 and row > 1:
                accepted = self._accepted(row, token_B, stacked_BnV[:, n : n + 1], complete[row - 1])
                if accepted is None:
                    continue
                token_B = accepted
            self.tokens_BN[:, position] = token_B
            self.decoded[row] += 1
            self.fresh.append(position)

    def _accepted(self, row: int, drawn: Tensor, scores: Tensor, certain: bool) -> Tensor | None:
        """The first token of a row once it is accepted. `drawn` is a draw from the new `scores`, which are `certain` where
        they are predicted from the real last token of the row above."""
        proposal = self.proposals.get(row)
        if proposal is None:
            self.proposals[row] = _Proposal(drawn, scores)
            return drawn if certain else None
        checked, accepted = self._checked(proposal, drawn, scores)
        if accepted or certain:
            return checked.token
        self.proposals[row] = checked
        return None

    def _checked(self, proposal: _Proposal, drawn: Tensor, scores: Tensor) -> tuple[_Proposal, bool]:
        """The proposal and True where it is still likely under the new scores, else another one and False."""
        if not self.sampler.generators:
            return _Proposal(drawn, scores), bool(drawn == proposal.token)
        new, old = scores.softmax(-1), proposal.scores.softmax(-1)
        token = int(proposal.token)
        (generator,) = self.sampler.generators
        threshold = torch.rand((), generator=generator, device=self.device)
        if bool(threshold * old[0, 0, token] < new[0, 0, token]):
            return proposal, True
        remains = (new - old).clamp_min(0)
        if not remains.any():  # the token has become less likely, so another more, unless rounding ate it
            return _Proposal(drawn, scores), False
        return _Proposal(self.sampler.draw(remains.log())[:, 0], remains.log()), False


@torch.inference_mode()
def generate_zipar(
    model: NAR,
    condition: Tensor,
    condition_mask: Tensor | None = None,
    *,
    window: int,
    adaptive: bool = False,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Draw samples from a raster model, int64 [B, h, w].

    Args:
        model: A raster model of pictures (`ModelConfig.order` "raster"), in evaluation mode.
        condition, condition_mask, guidance_scale, temperature, top_k, top_p, seeds, callback: As in
            `t2i.sampling.generate`.
        window: Tokens of a row after which the next one starts; the row's length and more is raster order.
        adaptive: Take `window` as the least, and widen it for each row until its first token is accepted. Samples are
            decoded one after the other, and `callback` sees one at a time.

    Raises ValueError for a model of another kind, a window below 1, and options out of range.
    """
    if model.config.order != "raster" or len(model.config.grid) != 2:
        raise ValueError(
            f"ZipAR decodes pictures of raster models, and this model writes a grid of {len(model.config.grid)} axes in "
            f"{model.config.order} order; use t2i.sampling.generate"
        )
    if window < 1:
        raise ValueError(f"window is {window}; a row starts after at least 1 token of the row above")
    if adaptive and len(condition) > 1:
        seeds = torch.randint(2**62, (len(condition),)).tolist() if seeds is None else seeds
        if len(seeds) != len(condition):
            raise ValueError(f"{len(seeds)} seeds for {len(condition)} samples; give one for each")
        samples = [
            generate_zipar(
                model, condition[b : b + 1], None if condition_mask is None else condition_mask[b : b + 1],
                window=window, adaptive=True, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k,
                top_p=top_p, seeds=[seed], callback=callback,
            )
            for b, seed in enumerate(seeds)
        ]  # fmt: skip
        return torch.cat(samples)
    sampler = Sampler(
        len(condition), condition.device, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k,
        top_p=top_p, seeds=seeds,
    )  # fmt: skip
    decoder = _Decoder(model, sampler, window, adaptive, *trimmed(condition, condition_mask))
    number = 0
    while True:
        if callback is not None:
            callback(number, decoder.tokens_BN.unflatten(1, model.config.grid))
        if decoder.done:
            return decoder.tokens_BN.unflatten(1, model.config.grid)
        decoder.advance()
        number += 1
