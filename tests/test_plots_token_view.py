from conftest import sentences, tiny_tokenizer

from kdlib.data.batches import collate
from kdlib.losses.signals import IGNORED
from kdlib.plots.tokens import token_view, visible


def view(row, rows=("the student learns", "a teacher says what it sees when words come back")):
    tokenizer = tiny_tokenizer(sentences(50))
    batch = collate([{"input_ids": tokenizer(text)["input_ids"]} for text in rows], pad_id=0)
    ids, labels, read = (batch[name][row].tolist() for name in ("input_ids", "labels", "attention_mask"))
    return token_view(ids, [label != IGNORED for label in labels], read, tokenizer.decode)


def test_each_token_is_learned_or_read_or_padding():
    short, long = view(0), view(1)
    learned = short.states.count("learned")
    assert short.states == ["context"] + ["learned"] * learned + ["padding"] * (
        len(long.states) - learned - 1
    )
    assert "".join(short.texts[: learned + 1]) == "the student learns"
    assert set(long.states[1:]) == {"learned"}


def test_text_from_data_stays_text_and_white_space_is_seen():
    shown = view(0, rows=("<script> alert </script>", "a"))
    assert "<script" not in shown._repr_html_()
    assert "&lt;" in shown._repr_html_()
    assert visible("a b\n\t\x07") == "a·b⏎→\\x07"


def test_the_legend_counts_what_occurs():
    assert "padding" not in str(view(1))
    assert f"learned: {view(0).states.count('learned')} (" in str(view(0))
    assert f"padding: {view(0).states.count('padding')} (" in str(view(0))
    assert "\x1b[" in str(view(0))
