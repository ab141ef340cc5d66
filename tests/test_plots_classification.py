import json

import made_answers

from kdlib.plots import comparison as plots
from kdlib.plots.axes import LABELS, called, on_axis
from kdlib.plots.classification import answer_figures, answer_tables
from kdlib.reports import html as pages


def test_mcnemars_table_counts_from_the_students_side():
    results = made_answers.results(count=300, classes=("a", "b", "c"))
    table = answer_tables(results)["mcnemar"]
    for test in results["mcnemar"]:
        if test["model"] == "distilled":
            line = table.loc[LABELS[test["against"]]]
            assert (line.iloc[0], line.iloc[1]) == (test["only_model_right"], test["only_other_right"])
    assert list(table.index) == ["CE-only baseline", "untrained student", "teacher"]


def test_tables_and_figures_are_made_from_what_stands_in_the_file():
    results = json.loads(json.dumps(made_answers.results(count=200, text="<b>$x$</b>")))
    tables, figures = answer_tables(results), answer_figures(results)
    assert set(tables) == {"mcnemar", "on_teachers_mistakes", "f1_per_class", "worst"}
    assert set(figures) == {"confusion", "reliability", "f1_per_class"}
    assert tables["f1_per_class"]["rows"].sum() == 200
    assert "<b>" not in tables["worst"].to_html()
    assert list(plots.quality_table(results).columns)[:2] == ["accuracy (primary)", "macro-F1"]
    assert plots.comparison_message(results).startswith(
        "Against the CE-only baseline, the distilled student shows: "
    )


def test_a_text_of_several_lines_is_one_that_the_page_breaks():
    results = made_answers.results(count=200, text="def f():\n\n    " + "return 1; " * 20)
    table = answer_tables(results)["worst"]
    assert table["text"].iloc[0].startswith("def f(): return 1;")
    assert 'class="dataframe words"' in pages.table(table)
    assert "words" not in pages.table(answer_tables(results)["mcnemar"])


def test_a_model_with_a_name_of_its_own_gets_no_article():
    assert [called(name, "The") for name in ("baseline", "mine")] == ["The CE-only baseline", "mine"]
    assert [on_axis(name) for name in ("baseline", "distilled_by_me")] == [
        "CE-only\nbaseline",
        "distilled_\nby_me",
    ]
