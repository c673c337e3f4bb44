"""`make clients`: every registered architecture in programs that people use beside transformers.

    python tests/clients/matrix.py [--all] [--only NAME,...]

Each client is a function below that takes a saved checkpoint and raises where something is wrong:
it checks figures, not only that nothing fails. The first tiny variant of each architecture is
tried, with ``--all`` all of them. The table is written into docs/use-it-with.md, and the page's own
examples are run. It is no part of the test suite: the clients are installed for it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from page import PAGE, run_examples, write_table

from contextlm.models.base import registry

ROWS = [{"prompt": f"{n} and {n + 1}", "answer": f" and {n + 2}."} for n in range(8)]
Client = Callable[[Path], None]
CLIENTS: dict[str, Client] = {}

# What there is no path to, by client and model type, and why; all else has to work.
ANY_LENGTH = "torch.export: any length"
UNROLLED = "the loop over tokens that updates its context becomes a graph for one length"
REFUSED: dict[tuple[str, str], str] = {
    (ANY_LENGTH, "context_kv"): UNROLLED,
    (ANY_LENGTH, "context_pythia"): UNROLLED,
    (ANY_LENGTH, "context_token"): UNROLLED,
    (ANY_LENGTH, "context_vector"): UNROLLED,
    (ANY_LENGTH, "dual_context"): "the graph serves whole windows or a part of one, as exported",
}


def client(name: str) -> Callable[[Client], Client]:
    """Lists a function as a client under the name that the table gives it."""

    def listed(function: Client) -> Client:
        CLIENTS[name] = function
        return function

    return listed


def opened(folder: Path) -> Any:
    """The checkpoint's model in float32, as `generate` would use it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def some_ids(length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, 200, (2, length), generator=generator)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def nearly(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Quantised weights: what they add is small beside the logits' own spread."""
    off = (actual.float() - expected).std() / expected.std()
    assert off < 0.2, f"the logits are off by {off:.2f} of their spread"


@client("pipeline")
def pipeline(folder: Path) -> None:
    from transformers import pipeline as make

    generate = make("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    text = generate("1 and 2", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("1 and 2")


@client("lm-eval: its own command")
def lm_eval(folder: Path) -> None:
    tasks = folder.parent / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "rows.json").write_text('{"text": "1 and", "choices": [" 2", " 3"], "answer": 0}')
    (tasks / "one.yaml").write_text(
        "task: one\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks / 'rows.json'}}}}}\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    command = [Path(sys.executable).with_name("lm_eval"), "--model", "hf", "--tasks", "one"]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True", "--device", "cpu"]
    command += ["--include_path", tasks]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert "|acc" in done.stdout.replace(" ", ""), done.stdout


@client("PEFT: LoRA")
def lora(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, ids = opened(folder), some_ids()
    with torch.no_grad():
        before = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    close(adapted(ids).logits, before)  # B starts at zero
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval()
    with torch.no_grad():
        after = adapted(ids).logits
        assert not torch.allclose(after, before, atol=1e-3)
        close(adapted.merge_and_unload()(ids).logits, after)


@client("PEFT: prompt tuning")
def prompt_tuning(folder: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model, ids = opened(folder), some_ids()
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = get_peft_model(model, settings).eval()
    # Virtual tokens stand in front, so the same as their embeddings there.
    with torch.no_grad():
        virtual = adapted.get_prompt(2)
        embeds = torch.cat([virtual, model.get_input_embeddings()(ids)], dim=1)
        close(
            adapted(ids, attention_mask=torch.ones_like(ids)).logits,
            model(inputs_embeds=embeds).logits,
        )


def settings(kind: Any, folder: Path, **given: Any) -> Any:
    """Arguments of a TRL trainer: two steps, nothing saved or reported."""
    return kind(
        output_dir=str(folder.parent / "trained"),
        max_steps=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        learning_rate=1e-2,
        **given,
    )


def trained(trainer: Any) -> None:
    """Train, and see that finite losses and other weights came of it."""
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    losses = trainer.train().training_loss
    assert losses == losses, "the loss is not a number"
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())


@client("TRL: SFT of a path")
def sft(folder: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"text": row["prompt"] + row["answer"]} for row in ROWS])
    trainer = SFTTrainer(
        model=str(folder),
        args=settings(SFTConfig, folder, per_device_train_batch_size=2, max_length=32),
        train_dataset=rows,
    )
    trained(trainer)
    trainer.save_model(str(folder.parent / "sft"))
    opened(folder.parent / "sft")


@client("TRL: SFT with packing")
def packed(folder: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"text": row["prompt"] + row["answer"]} for row in ROWS])
    packing = {"packing": True, "packing_strategy": "bfd", "padding_free": True}
    trainer = SFTTrainer(
        model=str(folder),
        args=settings(SFTConfig, folder, per_device_train_batch_size=2, max_length=48, **packing),
        train_dataset=rows,
    )
    trained(trainer)


@client("TRL: DPO of a path")
def dpo(folder: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = [{"prompt": r["prompt"], "chosen": r["answer"], "rejected": " no."} for r in ROWS]
    trainer = DPOTrainer(
        model=str(folder),
        args=settings(DPOConfig, folder, per_device_train_batch_size=2, max_length=32),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer_of(folder),
    )
    trained(trainer)


@client("TRL: GRPO with a reference")
def grpo(folder: Path) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=settings(
            GRPOConfig,
            folder,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=4,
            beta=0.1,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=tokenizer_of(folder),
    )
    trained(trainer)


@client("accelerate: offloading to disk")
def offloaded(folder: Path) -> None:
    from accelerate import disk_offload

    model, ids = opened(folder), some_ids()
    with torch.no_grad():
        expected = model(ids).logits
        disk_offload(model, str(folder.parent / "offload"), execution_device=torch.device("cpu"))
        close(model(ids).logits, expected)


@client("torchao: int8 weights")
def torchao(folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, ids = opened(folder), some_ids()
    with torch.no_grad():
        expected = model(ids).logits
        quantize_(model, Int8WeightOnlyConfig())
        nearly(model(ids).logits, expected)
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 15)


@client("bitsandbytes: int8 weights")
def bitsandbytes(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    ids = some_ids()
    chosen = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=chosen).eval()
    with torch.no_grad():
        nearly(model(ids).logits, opened(folder)(ids).logits)


@client("torch: dynamic int8")
def dynamic(folder: Path) -> None:
    model, ids = opened(folder), some_ids()
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})
    with torch.no_grad():
        nearly(small(ids).logits, model(ids).logits)


@client("torch.export: one length")
def exported(folder: Path) -> None:
    model, ids = opened(folder), some_ids()
    with torch.no_grad():
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        close(program.module()(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@client(ANY_LENGTH)
def exported_dynamic(folder: Path) -> None:
    model, ids = opened(folder), some_ids()
    length = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(
            model,
            (ids,),
            {"use_cache": False},
            dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
        )
        for other in (ids, some_ids(23)):
            close(
                program.module()(other, use_cache=False).logits,
                model(other, use_cache=False).logits,
            )


@client("ONNX: one length")
def onnx(folder: Path) -> None:
    import onnxruntime

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = opened(folder)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    ids, file = some_ids(), folder.parent / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(Logits().eval(), (ids,), str(file), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        close(torch.from_numpy(found), opened(folder)(ids).logits, 1e-3)


def save(name: str, fields: dict[str, Any], folder: Path) -> None:
    """A tiny model of a type with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

    letters = {byte: n for n, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**letters, "<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ends = {"eos_token": "<end>", "bos_token": "<end>", "pad_token": "<end>"}
    set_seed(0)
    ids = {"bos_token_id": 256, "eos_token_id": 256}
    config = registry()[name].config(**{**fields, "vocab_size": 257, **ids})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, **ends).save_pretrained(folder)


def outcome(client_name: str, model_type: str, fields: dict[str, Any]) -> str:
    """yes, no where `REFUSED` says why, or FAILED; the reason goes to stderr."""
    with tempfile.TemporaryDirectory() as place:
        try:
            save(model_type, fields, Path(place, "checkpoint"))
            with contextlib.redirect_stdout(sys.stderr):
                CLIENTS[client_name](Path(place, "checkpoint"))
        except Exception as error:  # whatever a client raises is a row of the table
            if (client_name, model_type) in REFUSED:
                return "no"
            print(f"\n{client_name}, {model_type} {fields}:", file=sys.stderr)
            traceback.print_exception(error, limit=-4, file=sys.stderr)
            return "FAILED"
    return "yes"


def of_variants(client_name: str, model_type: str, found: set[str]) -> str:
    """What the table says of a type whose variants gave these."""
    if "FAILED" in found:
        return "FAILED"
    if found == {"yes"} and (client_name, model_type) in REFUSED:
        return "FAILED: it works, strike it from REFUSED"
    return "some" if len(found) > 1 else found.pop()


def main() -> None:
    """Run the matrix and the page's examples; exit code 1 if anything failed that should work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="all tiny variants")
    parser.add_argument("--only", help="clients by name, comma-separated; the page is left alone")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_DISABLED": "true"}
    wanted = [name for name in CLIENTS if not given.only or name in given.only.split(",")]
    table: dict[str, dict[str, str]] = {}
    for name in wanted:
        row = table[name] = {}
        for model_type, entry in registry().items():
            variants = entry.tiny if given.all else entry.tiny[:1]
            found = {outcome(name, model_type, fields) for fields in variants}
            row[model_type] = of_variants(name, model_type, found)
        print(name, row, flush=True)
    failed = [name for name, row in table.items() if any("FAILED" in it for it in row.values())]
    if not given.only:
        write_table(table, REFUSED)
        failed += run_examples(PAGE.read_text("utf-8"))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
