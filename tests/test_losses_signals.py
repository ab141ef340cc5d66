import torch

from kdlib.losses.signals import IGNORED, LinearSignal, kept


def test_kept_shifts_once_and_drops_what_is_ignored():
    labels = torch.tensor([[5, 6, 7, IGNORED], [IGNORED, IGNORED, 8, 9]])
    tokens = kept(labels)
    assert tokens.targets.tolist() == [6, 7, 8, 9]
    assert tokens.rows.tolist() == [0, 0, 1, 1]
    # the position before each target, in the flattened [2 * 4]
    assert tokens.positions.tolist() == [0, 1, 5, 6]


def test_the_first_token_of_a_row_is_never_kept():
    assert kept(torch.tensor([[5, IGNORED], [6, IGNORED]])).targets.numel() == 0


def test_a_linear_signal_makes_logits_for_the_rows_asked_for():
    hidden, weight, bias = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)
    torch.testing.assert_close(
        LinearSignal(hidden, weight, bias).logits(slice(1, 3)), hidden[1:3] @ weight.T + bias
    )


def test_under_autocast_the_product_with_the_head_is_made_in_bfloat16(monkeypatch):
    monkeypatch.setattr("kdlib.hardware.bf16_instructions", lambda: ("avx512_bf16",))
    signal = LinearSignal(torch.randn(5, 3), torch.randn(7, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert signal.logits().dtype is torch.bfloat16
