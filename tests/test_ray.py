"""The example for Ray, on two actors of this machine."""

import json
import os
import subprocess
import sys

import pytest
from small import MODELS, ROOT

ray = pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")


def test_two_actors_answer_as_the_library_does(tmp_path, base):
    prompts = [f"{i}, {i + 1}," for i in range(40)]
    rows = [json.dumps({"id": i, "prompt": prompt}) for i, prompt in enumerate(prompts)]
    (tmp_path / "in.json").write_text("\n".join(rows))
    # More CPUs than actors: Ray uses one to read.
    code = f"""if True:
        import ray, ray_batch
        ray.init(num_cpus=4, include_dashboard=False)
        flags = {{"max_seq_len": 256, "max_batch_size": 1, "temperature": 0, "max_gen_len": 8}}
        ray_batch.main({str(tmp_path / "in.json")!r}, {str(tmp_path / "out")!r}, {str(MODELS / "small")!r}, **flags)"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = {row["id"]: row["generation"] for row in parquet.read_table(tmp_path / "out").to_pylist()}
    expected = base.text_completion(prompts, temperature=0, max_gen_len=8)
    assert [answers[i] for i in range(len(prompts))] == [answer["generation"] for answer in expected]
