"""Models that others made: chat templates that do the unexpected, tokenizers with habits, adapters of other programs.

Every tokenizer, template and adapter is built here; none is a real model's.
"""

import copy
import json
from datetime import datetime

import pytest
import torch
from conftest import SIZE, VOCABULARY, tiny_model, with_lora, word_tokenizer
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_python import PreTrainedTokenizer

import inference
import ppo
import prompts
import sft
from engine import loading, models, templates, tokens
from engine.engine import Engine
from engine.trees import Tree
from evaluation import answer_spaces
from machine.errors import ModelError, PromptError
from tasks.table import TASKS
from training.ppo_trainer import add_value_head

MR = TASKS["MR"]
ROW = {"id": 7, "sentence": "Two hours that feel like four.", "label": 1}
WIDE = dict(max_prompt_length=4000)  # a token for every byte

# Turns as in ChatML. A thought is opened as {opened}, kept as {kept}.
CHAT = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + THOUGHT + m.content + '<|im_end|>\n' }}{% endfor %}"
BEGIN = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def byte_tokenizer(template: str | None = None, before: bool = False, behind: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte. before, behind: begin- and end-of-sequence around every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<|im_start|>", "<|im_end|>", *alphabet])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if before or behind:
        single = f"{'<s> ' if before else ''}$A{' </s>' if behind else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    made.chat_template = template
    return made


def chat(thought: str = "", begin: str = "") -> str:
    """A template. thought: an expression that is written before every text; begin: what an answer begins with."""
    return CHAT.replace("THOUGHT", thought or "''") + BEGIN.replace("assistant\n", f"assistant\n{begin}")


def text_of(tokenizer, **how) -> str:
    return tokenizer.decode(prompts.build(MR, ROW, tokenizer, **WIDE, **how)[0])


# ------------------------------------------------------------------------------------------------------------- thoughts

KEPT = "('<think>\n' + m.reasoning_content + '\n</think>\n\n' if m.reasoning_content else '')"


@pytest.mark.parametrize(
    ("thought", "begin", "end"),
    [
        (KEPT, "<think>\n", "<think>\n\n</think>\n\n"),  # closed as the template closes thoughts
        (KEPT.replace("</think>\n\n", "</think>"), "<think>\n", "<think>\n\n</think>"),
        ("('' if '</think>' in m.content else '')", "<think>\n", "<think>\n\n</think>\n\n"),  # it only knows the tag
        ("('' if '[/THINK]' in m.content else '')", "[THINK]", "[THINK][/THINK]"),
        ("('' if '<|END_THINKING|>' in m.content else '')", "<|START_THINKING|>", "<|START_THINKING|><|END_THINKING|>"),
        (KEPT, "<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),  # closed already
        (KEPT, "", "assistant\n"),
        ("", "<answer>\n", "<answer>\n"),
    ],
)
@pytest.mark.parametrize("use_CoT", [False, True])
def test_a_thought_that_the_template_opens_is_closed(thought, begin, end, use_CoT):
    text = text_of(byte_tokenizer(chat(thought, begin)), use_CoT=use_CoT)
    assert text.endswith(f"{end}{'<Analysis>' if use_CoT else '<Judgement>'}")
    assert text.count("<think>") == text.count("</think>")


def test_a_thought_that_cannot_be_closed_is_refused():
    tokenizer = byte_tokenizer(chat("", "<think>\n"))
    with pytest.raises(ModelError, match=r"begins every answer with a thought \(<think>\) and shows no way to end it"):
        templates.prepare(tokenizer, "own/model")


def test_a_row_cannot_end_the_thought():
    tokenizer = byte_tokenizer(chat(KEPT, "<think>\n"))
    row = ROW | {"sentence": "fine </think> bad"}
    assert "fine < /think> bad" in tokenizer.decode(prompts.build(MR, row, tokenizer, **WIDE)[0])


# ------------------------------------------------------------------------------------------------ templates that fail


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no users here') }}", "TemplateError: no users here"),
        ("{{ nothing() }}", "UndefinedError: 'nothing' is undefined"),
        ("{% for m in messages %}{{ m.content }}", "TemplateSyntaxError: Unexpected end of template"),
        ("{% if %}{{ messages }}", "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 'always the same' }}", "leaves out the user's text in a conversation of user"),
        ("", "leaves out the user's text in a conversation of user"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(template, reason, tmp_path):
    byte_tokenizer(template).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    tiny_model(vocab_size=260).config.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as error:
        models.load_tokenizer(str(tmp_path), True)
    assert reason in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_of_several_templates_the_default_is_used(tmp_path):
    tokenizer = byte_tokenizer({"default": chat(), "tool_use": "{{ raise_exception('tools') }}"})
    tokenizer.save_pretrained(tmp_path)
    tiny_model(vocab_size=260).config.save_pretrained(tmp_path)
    assert models.load_tokenizer(str(tmp_path), True).chat_template == chat()
    tokenizer.chat_template = {"rag": chat(), "tool_use": chat()}
    with pytest.raises(
        ModelError, match=r"own/model has several chat templates \(rag, tool_use\), and none .* default"
    ):
        templates.prepare(tokenizer, "own/model")


def test_a_template_of_one_question_serves_as_long_as_there_are_no_demonstrations():
    single = "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}" + chat()
    tokenizer = byte_tokenizer(single)
    assert text_of(tokenizer).endswith("<Judgement>")
    with pytest.raises(ModelError, match="cannot render a conversation of user, assistant, user .*one at a time"):
        text_of(tokenizer, demonstrations=[ROW])
    # One that keeps the last turn alone would take the demonstrations away in silence.
    last = "{% set messages = messages[-1:] %}" + chat()
    with pytest.raises(ModelError, match="leaves out the user's text in a conversation of user, assistant, user"):
        text_of(byte_tokenizer(last), demonstrations=[ROW])


# ----------------------------------------------------------------------------------------------------------- the date

DATED = "{{ 'Today is ' + strftime_now('%d %b %Y, %H:%M') + '.\n' }}" + chat()


def test_a_template_that_asks_for_the_date_gets_the_one_it_was_set_to():
    tokenizer = byte_tokenizer(DATED)
    templates.set_time(tokenizer, datetime(2023, 4, 5, 6, 7))
    assert "Today is 05 Apr 2023, 06:07.\n" in text_of(tokenizer)
    assert "Today is 05 Apr 2023, 06:07.\n" in text_of(copy.deepcopy(tokenizer))
    assert datetime.now().strftime("%Y") in text_of(byte_tokenizer(DATED))


# ---------------------------------------------------------------------------------------------------- end-of-sequence


class Stubborn(PreTrainedTokenizerFast):
    """Adds its special tokens whatever it is told."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **{**kwargs, "add_special_tokens": True})


@pytest.mark.parametrize("template", [None, chat()])
@pytest.mark.parametrize("stubborn", [False, True])
def test_no_prompt_target_or_label_holds_an_added_end_of_sequence(template, stubborn):
    usual, tokenizer = byte_tokenizer(template, before=True), byte_tokenizer(template, before=True, behind=True)
    assert tokenizer("x").input_ids[-1] == tokenizer.eos_token_id
    if stubborn:
        tokenizer.__class__ = Stubborn
    shots = [ROW, ROW | {"label": 0}]
    for how in ({}, {"demonstrations": shots}, {"use_CoT": True}):
        expected, found = (prompts.build(MR, ROW, t, **WIDE, **how)[0] for t in (usual, tokenizer))
        assert found[-1] != tokenizer.eos_token_id and found.count(tokenizer.eos_token_id) == 0
        begun = [tokenizer.bos_token_id] if stubborn and template else []
        assert found == begun + expected
    assert answer_spaces.target_ids(MR, ROW, tokenizer) == answer_spaces.target_ids(MR, ROW, byte_tokenizer())
    spellings = answer_spaces.label_trie(MR, tokenizer).spellings
    assert spellings == answer_spaces.label_trie(MR, byte_tokenizer()).spellings
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & {token for s in spellings for token in s}


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_passage_is_shortened_by_as_much_as_without_end_of_sequence(stubborn):
    task = TASKS["BoolQ"]
    row = {"id": 1, "passage": "The Elm is a river. " * 40, "question": "is the elm a river", "label": 1}
    built = []
    for tokenizer in (byte_tokenizer(), byte_tokenizer(behind=True)):
        if stubborn and built:
            tokenizer.__class__ = Stubborn
        built.append(prompts.build(task, row, tokenizer, max_prompt_length=600))
    assert built[0] == built[1] and built[0][1] and 590 < len(built[0][0]) <= 600


# ------------------------------------------------------------------------------------------- tokenizers without offsets


class Slow(PreTrainedTokenizer):
    """One token per two characters, in Python; it does not say which characters a token stands for."""

    def __init__(self, **kwargs):
        self.pairs: dict[str, int] = {"</s>": 0}
        super().__init__(eos_token="</s>", pad_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.pairs)

    def get_vocab(self):
        return dict(self.pairs)

    def _tokenize(self, text, **kwargs):
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    def _convert_token_to_id(self, token):
        return self.pairs.setdefault(token, len(self.pairs))

    def _convert_id_to_token(self, index):
        return next(token for token, number in self.pairs.items() if number == index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def test_a_tokenizer_without_offsets_shortens_all_the_same():
    tokenizer, task = Slow(), TASKS["BoolQ"]
    assert not tokenizer.is_fast
    row = {"id": 1, "passage": "The Elm is a river. " * 40, "question": "is the elm a river", "label": 1}
    ids, shortened = prompts.build(task, row, tokenizer, max_prompt_length=300)
    assert shortened and 290 < len(ids) <= 300 and ids == prompts.build(task, row, tokenizer, max_prompt_length=300)[0]
    text = tokenizer.decode(ids)
    assert "Passage: The Elm is a river. " in text and "is the elm a river" in text and text.endswith("<Judgement>")
    with pytest.raises(PromptError, match="even without its passage"):
        prompts.build(task, row, tokenizer, max_prompt_length=100)


@pytest.mark.parametrize("make", [byte_tokenizer, Slow])
def test_a_shortened_text_is_shorter_each_time(make):
    tokenizer, text = make(), "x\N{GRINNING FACE} y" * 5
    for excess in (1, 3, 100):
        shorter = text
        while shorter:
            before, shorter = shorter, tokens.shorten(tokenizer, shorter, excess)
            assert before.startswith(shorter) and len(shorter) < len(before)


# ------------------------------------------------------------------------------------------------------------ adapters

IDS = torch.tensor([[5, 9, 4, 17, 30]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a whole model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def train(model, folder, base, targets="all-linear", **how):
    """Put an adapter on the model and save it as one of `base`; returns the adapted model."""
    adapted = with_lora(model, target_modules=targets)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, **how)
    return adapted


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder) -> str:
    with pytest.raises(ModelError) as error:
        models.load_model(str(folder), from_local=True)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_adapter_is_merged(base, tmp_path):
    adapted = train(tiny_model(), tmp_path, base)
    merged = models.load_model(str(tmp_path), from_local=True)
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(IDS).logits, tiny_model()(IDS).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [3, -2])
def test_an_adapter_of_another_vocabulary_brings_its_embeddings(tied, more, tmp_path):
    base = tmp_path / "base"
    tiny_model(tie_word_embeddings=tied).save_pretrained(base)
    model = models.load_model(str(base), from_local=True)
    model.resize_token_embeddings(SIZE + more)
    adapted = train(model, tmp_path / "adapter", base, save_embedding_layers=True)
    merged = models.load_model(str(tmp_path / "adapter"), from_local=True)
    assert merged.get_input_embeddings().num_embeddings == merged.config.vocab_size == SIZE + more
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_base_of_another_size_is_refused(base, tmp_path):
    train(tiny_model(hidden_size=64), tmp_path, base)
    text = refusal(tmp_path)
    assert f"the adapter {tmp_path} does not fit its base model" in text and "size mismatch" in text


@pytest.mark.parametrize(("layers", "what"), [(1, "lacks"), (3, "has a weight that its base model has no place for")])
def test_an_adapter_of_another_number_of_layers_is_refused(layers, what, base, tmp_path):
    train(tiny_model(num_hidden_layers=layers), tmp_path, base, targets=["q_proj", "v_proj"])
    assert what in refusal(tmp_path)


def test_an_adapter_that_lacks_weights_or_has_others_is_refused(base, tmp_path):
    train(tiny_model(), tmp_path, base)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "adapter_model.safetensors")
    assert f"the adapter {tmp_path} lacks base_model" in refusal(tmp_path)
    # The head of a classifier, say: the labels would be answered as if it were not there.
    head = {"base_model.model.score.weight": torch.zeros(2, 32)}
    save_file(weights | head, tmp_path / "adapter_model.safetensors")
    text = refusal(tmp_path)
    assert "no place for: base_model.model.score.weight (0 weights are missing, 1 are left over)" in text


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_an_adapter_that_was_cut_short_is_refused(size, base, tmp_path):
    train(tiny_model(), tmp_path, base)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} cannot be read" in refusal(tmp_path)


def test_a_model_that_was_cut_short_is_refused(base, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    assert f"lack 1 of its weights, such as {lost}" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1])
    assert f"the model --train_model_name {tmp_path} could not be loaded" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"peft_type": "LORA", ', "cannot be read"),
        ("", "cannot be read"),
        ("[]", "peft_type is None"),
        ('{"peft_type": "MAGIC", "base_model_name_or_path": "x"}', "peft_type is 'MAGIC', which peft"),
        ('{"peft_type": "LORA", "base_model_name_or_path": null}', "base_model_name_or_path is None"),
        ('{"peft_type": "LORA"}', "base_model_name_or_path is None"),
    ],
)
def test_a_broken_adapter_config_is_refused(text, reason, base, tmp_path):
    train(tiny_model(), tmp_path, base)
    (tmp_path / "adapter_config.json").write_text(text)
    found = refusal(tmp_path)
    assert reason in found and str(tmp_path / "adapter_config.json") in found


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_by_its_type(config, base, tmp_path):
    adapted = get_peft_model(tiny_model(), config)
    adapted.save_pretrained(tmp_path)
    change_config(tmp_path, base_model_name_or_path=str(base))
    assert f"the adapter {tmp_path} is of the type {config.peft_type.value}, which cannot be merged" in refusal(
        tmp_path
    )


def test_a_refused_adapter_leaves_nothing_behind(tmp_path, data_root, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model(vocab_size=260).save_pretrained(base)
    byte_tokenizer(chat()).save_pretrained(base)
    train(tiny_model(vocab_size=260, hidden_size=64), adapter, base)
    for script in (inference, sft):
        given = dict(task="SST", data_path=data_root, train_model_name=adapter, from_local=True, report_to="none")
        given |= dict(output_dir=tmp_path / "run", max_prompt_length=1000, eval_size=4)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            script.main([part for name, value in given.items() for part in (f"--{name}", str(value))])
        text = capsys.readouterr().err
        assert end.value.code == 2 and "does not fit its base model" in text and text.count("\n") == 1
        assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ an adapter's own tokenizer


def test_an_adapters_own_tokenizer_and_template_are_used(base, tmp_path):
    adapter, later = tmp_path / "adapter", tmp_path / "later"
    train(tiny_model(), adapter, base)
    assert models.load_tokenizer(str(adapter), True).chat_template is None
    # A template alone, as a training script may leave it.
    (adapter / "chat_template.jinja").write_text(chat())
    assert models.load_tokenizer(str(adapter), True).chat_template == chat()
    assert models.load_tokenizer(str(base), True).chat_template is None
    # A whole tokenizer.
    own = word_tokenizer()
    own.add_tokens(["<extra>"])
    own.chat_template = chat(begin="Well. ")
    own.save_pretrained(adapter)
    found = models.load_tokenizer(str(adapter), True)
    assert found.chat_template == chat(begin="Well. ") and found.get_vocab() == own.get_vocab() != VOCABULARY
    # Below a later adapter, where it is the one that counts, until that one brings its own.
    train(models.load_model(str(adapter), True), later, base)
    models.save_start_adapter(str(adapter), True, later)
    assert models.load_tokenizer(str(later), True).get_vocab() == own.get_vocab()
    assert models.load_tokenizer(str(later), True).chat_template == chat(begin="Well. ")
    word_tokenizer().save_pretrained(later)
    found = models.load_tokenizer(str(later), True)
    assert found.get_vocab() == VOCABULARY and found.chat_template is None


# ------------------------------------------------------------------------------------- what a model can read and take


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=71), 71),
        (GPT2Config(n_positions=72), 72),
        (MptConfig(max_seq_len=73), 73),
        (PreTrainedConfig(max_sequence_length=74), 74),
        (PreTrainedConfig(seq_length=75), 75),
        (PreTrainedConfig(n_ctx=76), 76),
        (MambaConfig(), None),
    ],
)
def test_the_length_limit_is_found_under_any_name(config, limit):
    assert loading.length_limit(config) == limit


def test_prompts_longer_than_a_model_can_read_are_refused(tmp_path):
    tiny_model("mpt").save_pretrained(tmp_path)
    loading.load_engine(str(tmp_path), word_tokenizer(), 128, from_local=True)
    with pytest.raises(ModelError, match="make 129 tokens, more than the 128 tokens that"):
        loading.load_engine(str(tmp_path), word_tokenizer(), 129, from_local=True)


def test_a_tokenizer_larger_than_its_model_is_refused_where_it_matters(tmp_path, data_root, capsys):
    """Some models have more tokens than embeddings, and no text is ever given the others."""
    folder = tmp_path / "model"
    tokenizer = byte_tokenizer(chat())
    tokenizer.add_tokens(["<image>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    size = len(tokenizer)
    for rows, code in ((size - 2, None), (size - 100, 2)):
        tiny_model(vocab_size=rows, max_position_embeddings=2048).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for script in (inference, sft, ppo):
            given = dict(task="SST", data_path=data_root, train_model_name=folder, from_local=True, report_to="none")
            given |= dict(output_dir=tmp_path / f"{script.__name__}-{rows}", eval_size=4, max_prompt_length=1000)
            given |= {} if script is inference else dict(max_steps=1, batch_sentence_num=2)
            command = [part for name, value in given.items() for part in (f"--{name}", str(value))]
            capsys.readouterr()
            if code is None:
                script.main(command)
                continue
            with pytest.raises(SystemExit) as end:
                script.main(command)
            text = capsys.readouterr().err
            assert end.value.code == code and text.count("\n") == 1 and not given["output_dir"].exists()
            assert f"has {size} tokens, but the model has embeddings for {rows}" in text


def test_tokens_that_an_adapter_added_without_embeddings_get_the_mean(base, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapted = train(tiny_model(), adapter, base)
    own = word_tokenizer()
    own.add_tokens(["<extra>", "<more>"])
    own.save_pretrained(adapter)
    tokenizer = models.load_tokenizer(str(adapter), True)
    engine = loading.load_engine(str(adapter), tokenizer, 20, from_local=True)
    assert f"{adapter} has 2 tokens without embeddings: they get the mean of all others." in capsys.readouterr().out
    embeddings = engine.model.get_input_embeddings().weight
    assert len(embeddings) == SIZE + 2
    torch.testing.assert_close(embeddings[SIZE:], embeddings[:SIZE].mean(0).expand(2, -1))
    torch.testing.assert_close(engine.model(IDS).logits[..., :SIZE], adapted(IDS).logits, rtol=1e-4, atol=1e-4)
    # A base's own tokenizer may be larger than the model: that is how it was trained, and nothing is added.
    own.save_pretrained(tmp_path / "base")
    tiny_model().save_pretrained(tmp_path / "base")
    engine = loading.load_engine(str(tmp_path / "base"), own, 20, from_local=True)
    assert engine.model.get_input_embeddings().num_embeddings == SIZE


def tiny_mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=1, pad_token_id=0)
    )


def test_layers_that_peft_refuses_are_left_out_and_named(capsys):
    model = tiny_mamba()
    config = models.lora_config_for(model)
    assert capsys.readouterr().out == "Without an adapter, as peft refuses one there: out_proj.\n"
    adapted = {name for name, _ in get_peft_model(model, config).named_parameters() if "lora_A" in name}
    assert len(adapted) == 6 and not any("out_proj" in name for name in adapted)  # in_proj, x_proj and dt_proj


def test_the_usual_models_are_adapted_as_ever(capsys):
    for kind in ("llama", "gpt2", "neox", "mpt"):
        assert models.lora_config_for(tiny_model(kind)).to_dict() == models.lora_config().to_dict()
    assert capsys.readouterr().out == ""


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ModelError, match="no linear layer that LoRA can be put on; choose another"):
        models.lora_config_for(tiny_model(num_hidden_layers=0))


def test_the_value_head_is_as_wide_as_the_states_it_reads(tokenizer):
    """OPT-350m projects its last states to the width of its embeddings."""
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=SIZE, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2,
            num_attention_heads=4, dropout=0.0, eos_token_id=1, pad_token_id=0, do_layer_norm_before=False,
        )
    ).eval()  # fmt: skip
    engine = Engine(model, tokenizer)
    loading.check(engine)
    add_value_head(model)
    (states,) = engine.states([[5, 9, 4]], [Tree()])
    assert states.shape == (1, 16) and model.value_head(states).shape == (1, 1)
    expected = model(torch.tensor([[5, 9, 4]])).logits[0, -1]
    torch.testing.assert_close(engine.logits(states)[0], expected, rtol=1e-4, atol=1e-4)
