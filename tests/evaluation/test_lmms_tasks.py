"""Data sets from a mirror as lmms-eval gets them; a sentence for what is missing, damaged or of another shape."""

import pytest

from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import data, scoring, suite
from pmod_cli.evaluation.benchmarks import Benchmark, Split, groups
from pmod_cli.evaluation.questions import load_tasks
from tests.evaluation import mirrors


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return mirrors.write(tmp_path_factory.mktemp("mirror"))


def benchmark(name: str) -> Benchmark:
    return suite.resolve([name])[0]


def test_every_benchmark_is_read_from_its_mirror(root):
    data.require_data(groups()["paper"], root)
    for each in groups()["paper"]:
        tasks, made = load_tasks(each, root), mirrors.mirrored(each.name)
        rows = [row for split in made.rows.values() for row in split]
        loaded = [doc for task in tasks.values() for doc in task.eval_docs]
        assert sorted(doc["question"] for doc in loaded) == sorted(row["question"] for row in rows)


def test_pictures_of_gqa_are_those_of_their_questions(root):
    """As lmms-eval joins them, without its copy of the picture in every row."""
    (task,) = load_tasks(benchmark("gqa"), root).values()
    pictures = {row["id"]: row["image"] for row in mirrors.gqa().pictures}
    for doc in task.eval_docs:
        (shown,) = task.doc_to_visual(doc)
        assert shown.tobytes() == pictures[doc["imageId"]].tobytes()
    assert "image" not in task.eval_docs.column_names


def test_a_picture_that_is_not_there(tmp_path):
    mirrors.write(tmp_path, ["gqa"])
    made = mirrors.gqa()
    mirrors.write_split(
        tmp_path, benchmark("gqa").data[1], made.pictures[:1], {"id": mirrors.TEXT, "image": mirrors.PICTURE}
    )
    (task,) = load_tasks(benchmark("gqa"), tmp_path).values()
    with pytest.raises(PmodError, match="has no picture n1"):
        task.doc_to_visual({"imageId": "n1"})


def test_another_task_of_lmms_eval_reads_the_mirror_too(root):
    """`pope` of lmms-eval asks the three splits as one data set; it is no benchmark of the suite."""
    rows = [row for split in mirrors.pope().rows.values() for row in split]
    mirrors.write_split(root, Split("lmms-lab-encoder/POPE"), rows, mirrors.pope().features)
    (task,) = load_tasks(benchmark("lmms:pope"), root).values()
    assert len(task.eval_docs) == 24
    with pytest.raises(PmodError, match="lmms-lab-encoder/LMMs-Eval-Lite chartqa lite: not in"):
        load_tasks(benchmark("chartqa_lite"), root)


def test_all_that_is_missing_is_said_at_once(tmp_path):
    mirrors.write(tmp_path, ["chartqa"])
    with pytest.raises(PmodError) as failure:
        data.require_data(suite.resolve(["docvqa", "chartqa", "gqa", "tiny"]), tmp_path)
    assert failure.value.code == 2
    assert f"the data of DocVQA, GQA is not whole in {tmp_path}" in failure.value.what
    assert "lmms-lab-encoder/DocVQA DocVQA validation (2.3 GB)" in failure.value.what
    assert "testdev_balanced_images testdev (66 MB); 2.4 GB in all" in failure.value.what
    assert f"pmod eval --fetch-data docvqa,gqa --data-root {tmp_path}" in failure.value.hint
    with pytest.raises(PmodError, match="no such folder") as failure:
        data.require_data(suite.resolve(["blink", "docvqa"]), tmp_path / "else where")
    assert failure.value.hint == f"pmod eval --fetch-data docvqa --data-root '{tmp_path / 'else where'}'"
    with pytest.raises(PmodError, match="no such folder") as failure:
        data.require_data(suite.resolve(["blink"]), tmp_path / "elsewhere")
    assert failure.value.hint is None, "no mirror has these data"
    with pytest.raises(PmodError, match="not on this machine"):
        data.require_data(suite.resolve(["docvqa"]))


def test_a_mirror_with_another_split_is_no_mirror_of_this_one(tmp_path):
    made = mirrors.docvqa()
    mirrors.write_split(
        tmp_path, Split("lmms-lab-encoder/DocVQA", "DocVQA", "test"), made.rows["validation"], made.features
    )
    with pytest.raises(PmodError, match="DocVQA validation"):
        data.require_data([benchmark("docvqa")], tmp_path)
    with pytest.raises(PmodError, match="DocVQA validation: not in"):
        load_tasks(benchmark("docvqa"), tmp_path)


def test_half_a_split_is_none(tmp_path):
    mirrors.write(tmp_path, ["chartqa"])
    (source,) = benchmark("chartqa").data
    (file,) = data.find(source, tmp_path)
    file.rename(file.with_name("test-00000-of-00002.parquet"))
    assert data.find(source, tmp_path) == []


def test_files_of_a_split():
    plain, named = Split("a/b", "", "test"), Split("a/b", "en", "dev")
    names = ["data/test-0.parquet", "data/train-0.parquet", "en/dev-0.parquet", "cn/dev-0.parquet", "notes/test-1.txt"]
    assert data.split_files(plain, names, None) == ["data/test-0.parquet"]
    assert data.split_files(named, names, None) == ["en/dev-0.parquet"]
    card = "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: dev\n    path: cn/dev-*\n---\nwords"
    assert data.split_files(named, names, card) == ["cn/dev-0.parquet"]
    assert data.split_files(plain, names, card) == ["data/test-0.parquet"]
    assert data.split_files(plain, names, "---\nconfigs: [\n---\n") == ["data/test-0.parquet"]
    assert data.split_files(Split("a/b", "", "validation"), names, None) == []


@pytest.mark.parametrize(
    "header",
    [
        *("- a", "words", "configs: 3", "configs: [default]", "configs: [null]"),
        *("configs: [{config_name: default, data_files: 3}]", "configs: [{config_name: default, data_files: data/*}]"),
        "configs: [{config_name: default, data_files: [{split: test, path: 3}]}]",
        "configs: [{config_name: default, data_files: [{split: test, path: [3, null]}]}]",
    ],
)
def test_a_card_of_another_form_is_silent(header):
    names = ["data/test-0.parquet", "data/train-0.parquet"]
    assert data.split_files(Split("a/b"), names, f"---\n{header}\n---\n") == names[:1]


def test_damaged_texts_of_a_mirror_are_passed_over(tmp_path):
    mirrors.write(tmp_path, ["chartqa"])
    (source,) = benchmark("chartqa").data
    (tmp_path / source.repository / data.CARD).write_bytes(b"---\n\xff\xfe\n---\n")
    (tmp_path / data.CHECKSUMS).write_bytes(b"\xff\xfe  a\n0123  b\n")
    assert [file.name for file in data.find(source, tmp_path)] == ["test-00000-of-00001.parquet"]
    assert data.checksums(tmp_path)["b"] == "0123"


def test_wrong_columns_no_rows_a_damaged_file(tmp_path):
    """What is only seen when the file is opened: the task fails, with a sentence."""
    mirrors.write(tmp_path, ["chartqa"])
    (source,) = benchmark("chartqa").data
    made = mirrors.chartqa()
    renamed = [
        {"query" if name == "question" else name: value for name, value in row.items()} for row in made.rows["test"]
    ]
    features = {"query" if name == "question" else name: kind for name, kind in made.features.items()}
    file = mirrors.write_split(tmp_path, source, renamed, features)
    expected = "expected the columns image, question, answer, type; question not found among image, query"
    with pytest.raises(PmodError, match=expected) as failure:
        load_tasks(benchmark("chartqa"), tmp_path)
    assert failure.value.code == 1

    mirrors.write_split(tmp_path, source, [], made.features)
    with pytest.raises(PmodError, match="no rows in"):
        load_tasks(benchmark("chartqa"), tmp_path)

    mirrors.write_split(tmp_path, source, made.rows["test"], made.features)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PmodError, match="is no whole parquet file") as failure:
        load_tasks(benchmark("chartqa"), tmp_path)
    assert "sha256sum --check SHA256SUMS" in failure.value.hint


def test_listing_says_what_is_here(tmp_path):
    mirrors.write(tmp_path, ["pope", "docvqa"])
    rows = {row["name"]: row for row in data.listing(data_root=tmp_path)}
    assert [name for name, row in rows.items() if row["here"] and not name.startswith("tiny_")] == ["pope", "docvqa"]
    assert rows["pope"]["split"] == ["adversarial", "popular", "random"]
    assert (rows["infovqa"]["data"], rows["infovqa"]["rows"]) == (["lmms-lab-encoder/DocVQA"], 2801)


def test_guesses_are_counted():
    """One answer without an option: MMMU draws, MMBench and RealWorldQA find no letter."""
    from lmms_eval.tasks._task_utils import mmmu_mcq_utils
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
    from lmms_eval.tasks.realworldqa import utils as rwqa

    parse = mmmu_mcq_utils.parse_mmmu_multi_choice_response
    item = {**dict(zip("ABCD", mirrors.OPTIONS, strict=True)), "index": 0, "category": "x", "answer": "A"}
    with scoring.counting_guesses() as guesses:
        for said in ("A", "hm"):
            parse(said, ["A", "B"], {"A": "cat", "B": "dog"})
            rwqa.realworldqa_process_results({"answer": "A"}, [said])
            MMBench_Evaluator().eval_result([{**item, "prediction": said}], "static")
    assert (guesses.drawn, guesses.unread) == (1, 2)
    parse("hm", ["A"], {"A": "cat"})
    assert guesses.drawn == 1, "nothing is watched outside the block"
