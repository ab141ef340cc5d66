"""Whether a language model looks ahead, at the very tokens that it is to predict."""

import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdlib.errors import ModelError
from kdlib.models.hooks import as_evaluated

ROW = 16  # tokens of the row whose end is changed
ENDS = 3  # in how many ways
# settings by which models of these names look ahead, and what they have where they do not
SETTINGS = {
    "is_decoder": True,
    "use_bidirectional_attention": False,
    "causal": True,
    "is_causal": True,
}

FOUND = "another last token changes what it says before that token, by {:.2g} of its logits' spread"
WHY = "it reads the token that it is to predict, so its figures would mean nothing"


@torch.no_grad()
def look_ahead(model: PreTrainedModel, ids: Tensor) -> float:
    """How much logits change with a token that comes after them, relative to their spread; 0 if causal.

    One forward pass of a row with several last tokens.  A position's change is the least that any of them
    made: what rounding does to some experts' products depends on the token, what attention shows does not.

    Args:
        ids: [1, T] of a row as the model reads it.
    """
    row = (ids if ids.shape[1] > 1 else ids.repeat(1, 2))[0, :ROW].to(model.device)
    others = [token for token in row.unique().tolist() if token != row[-1]][:ENDS] or [int(row[-1] == 0)]
    rows = row.repeat(1 + len(others), 1)
    rows[1:, -1] = torch.tensor(others, device=row.device)
    with as_evaluated(model):
        output = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)
    logits = output.logits[:, :-1].float()
    changes = (logits[1:] - logits[0]).square().mean(-1).sqrt().amin(0)  # [T - 1]
    return float(changes.amax() / logits[0].std().clamp(min=1e-30))


def rounding(model: PreTrainedModel) -> float:
    """What `look_ahead` may give of a causal model; experts' products were seen to do 2e-7 in float32."""
    return 1e-4 if torch.finfo(model.dtype).eps < 1e-6 else 1e-2


def check_causal(name: str, model: PreTrainedModel, ids: Tensor) -> float:
    """`look_ahead`, where it is no more than rounding.

    Args:
        name: whose, for the message.

    Raises:
        ModelError: the model reads the token that it is to predict.
    """
    if (found := look_ahead(model, ids)) > rounding(model):
        raise ModelError(f"{name} looks ahead: {FOUND.format(found)}; {WHY}: {remedy(model)}")
    return found


def remedy(model: PreTrainedModel) -> str:
    """What to do about a model that looks ahead."""
    config = model.config.get_text_config()
    settings = [name for name, causal in SETTINGS.items() if getattr(config, name, causal) != causal]
    if not settings:
        return "name a causal language model"
    written = ", ".join(f'"{name}": {json.dumps(SETTINGS[name])}' for name in settings)
    return f"name a checkpoint that was trained as a causal language model, with {written} in its config.json"
