"""A student whose adapter alone is trained."""

from transformers import PreTrainedModel

from kdlib.config.run import Config
from kdlib.hardware import precision_of
from kdlib.models.adapters import adapted, is_adapted
from kdlib.models.heads import head_form
from kdlib.models.loading import device_of


def with_adapter(config: Config, student: PreTrainedModel) -> PreTrainedModel:
    """The student as it is trained: with its adapter, where it has one, on a base in the run's precision.

    Raises:
        ModelError: see kdlib.models.adapters.adapted.
    """
    if config.student.adapter is None:
        return student
    dtype, _ = precision_of(config.precision, device_of(config.wanted_device))
    for parameter in student.parameters():  # not `to`: rotary frequencies stay in float32, as from_pretrained
        parameter.data = parameter.data.to(dtype)
    return adapted(student, config.student.adapter)


def trained_part(student: PreTrainedModel) -> str:
    """What of a student with an adapter is trained, and how its logits are made; "" of one without."""
    if not is_adapted(student):
        return ""
    trained = sum(each.numel() for each in student.parameters() if each.requires_grad)
    found = f", of which an adapter of {trained / 1e6:.2f} M is trained, on a base in {student.dtype}"
    at_once = head_form(student) is None and student.get_output_embeddings() is not None
    what = "; its head has an adapter too, so its logits are made all at once, not by the chunk"
    return found.replace("torch.", "") + what * at_once
