"""Training: sequences are conversations side by side, a climb learns, stops, and goes on."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="training needs the train extra")

from duetto import LLM, SamplingParams  # noqa: E402
from duetto.checkpoints.tokenizer import load_tokenizer  # noqa: E402
from duetto.evals.worlds.prompt import user_turn  # noqa: E402
from duetto.evals.worlds.world import WorldOptions, draw_world  # noqa: E402
from training.climb import Climb, Plan, is_passed  # noqa: E402
from training.distill import distill, draw_steps, shortened  # noqa: E402
from training.draws import MAX_ASKED, bridged  # noqa: E402
from training.export import export  # noqa: E402
from training.llama import Llama  # noqa: E402
from training.measure import agreement, exact, held_out, load  # noqa: E402
from training.rungs import ladder, longer  # noqa: E402
from training.sequences import from_world, make_batch  # noqa: E402
from training.shapes import named_shape  # noqa: E402
from training.tokenizer import END, train_tokenizer, write_tokenizer  # noqa: E402

torch.set_num_threads(1)
EASY = replace(ladder()[0], batch_size=8, max_steps=20)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(1000)


def make_model(tokenizer, name="nano"):
    torch.manual_seed(1)
    return Llama(named_shape(name, tokenizer.get_vocab_size()))


def logits_of(model, batch):
    with torch.no_grad():
        return model(batch.ids, batch.positions, batch.mask, batch.wanted)


@pytest.fixture(scope="module")
def sequence(tokenizer):
    world = draw_world(3, "train", WorldOptions())
    return world, from_world(world, world.questions, tokenizer)


# --- sequences ---------------------------------------------------------------------------------


def test_a_question_is_the_chat_template_s_tokens(tokenizer, sequence, tmp_path):
    write_tokenizer(tokenizer, tmp_path, 512)
    loaded = load_tokenizer(tmp_path, eos_token_ids=[4])
    world, drawn = sequence
    for question, asked in zip(world.questions, drawn.asked, strict=True):
        turns = [user_turn(world.documents, question.text)]
        prompt = tuple(token for part in drawn.parts for token in part) + asked.prompt
        rendered = loaded.render_chat(turns)
        assert list(prompt) == loaded.encode(rendered, add_special_tokens=False)
        whole = f"{rendered} {question.full_answer}{END}"
        assert list(prompt + asked.answer) == loaded.encode(whole, add_special_tokens=False)


def test_many_questions_compute_what_each_alone_does(tokenizer, sequence):
    model = make_model(tokenizer, "draft")
    _, drawn = sequence
    together = make_batch([drawn])
    expected = logits_of(model, together)
    for number, asked in enumerate(drawn.asked):
        alone = make_batch([replace(drawn, asked=(asked,))])
        assert torch.equal(alone.targets, together.targets[together.answer_of == number])
        torch.testing.assert_close(
            logits_of(model, alone), expected[together.answer_of == number], atol=1e-4, rtol=1e-4
        )


def test_padding_changes_nothing(tokenizer, sequence):
    model = make_model(tokenizer, "draft")
    _, drawn = sequence
    short = replace(drawn, asked=drawn.asked[:1])
    both = logits_of(model, make_batch([short, drawn]))
    alone = logits_of(model, make_batch([short]))
    torch.testing.assert_close(both[: len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_apart_hides_documents_from_each_other_only(tokenizer, sequence):
    """The mask is checked against its definition, place by place."""
    _, drawn = sequence
    batch = make_batch([drawn], apart=True)
    part_of = [number for number, part in enumerate(drawn.parts) for _ in part]
    mask = batch.mask[0, 0]
    for row, part in enumerate(part_of):
        seen = [column for column in range(row + 1) if part_of[column] == part]
        assert mask[row].nonzero().flatten().tolist() == seen
    first = drawn.num_shared
    assert mask[first].nonzero().flatten().tolist() == list(range(first + 1))
    assert torch.equal(batch.positions, make_batch([drawn]).positions)


@pytest.mark.parametrize("rung", (*ladder(), *longer()), ids=lambda rung: rung.name)
def test_every_rung_draws_the_same_again_and_other_held_out_data(rung, tokenizer):
    drawn = rung.draw(7, "train", tokenizer)
    assert drawn == rung.draw(7, "train", tokenizer)
    assert drawn != rung.draw(7, "eval", tokenizer)
    assert 0 < len(drawn.asked) <= 2 * MAX_ASKED
    tested = rung.tested or rung.draw
    kinds = {a.kind for seed in range(30) for a in tested(seed, "eval", tokenizer).asked}
    assert set(rung.marks) <= kinds


def test_a_batch_of_a_mix_draws_alike(tokenizer):
    """So that hardly a place of it is padding."""
    (mixed,) = (rung for rung in ladder() if rung.name == "scattered")
    sizes = [
        [len(mixed.draw(seed, "train", tokenizer).asked) for seed in range(first, first + 32)]
        for first in range(0, 320, 32)
    ]
    assert all(len(set(batch)) == 1 for batch in sizes)
    assert len({batch[0] for batch in sizes}) > 1


def test_a_second_hop_names_what_the_whole_question_describes(tokenizer):
    drawn = bridged(3)(5, "train", tokenizer)
    two = [a for a in drawn.asked if a.kind == "two_hop"]
    one = [a for a in drawn.asked if a.kind == "one_hop"]
    for question, second in zip(two, one[: len(two)], strict=True):
        assert question.answer[-len(second.answer) :] == second.answer
        assert " of" in tokenizer.decode(question.prompt)
        assert " of" not in tokenizer.decode(second.prompt)


# --- climbing ----------------------------------------------------------------------------------


def test_marks_are_for_all_kinds():
    assert is_passed({"one_hop": 0.95, "two_hop": 0.5}, {"one_hop": 0.95})
    assert not is_passed({"one_hop": 0.94}, {"one_hop": 0.95})


def test_the_loss_falls(tokenizer, tmp_path):
    climb = Climb(make_model(tokenizer), tokenizer, [EASY], Plan(directory=tmp_path))
    lines = []
    assert climb.run(lines.append)  # its few steps are not enough to pass, and it goes on
    assert climb.progress.rung == 1
    assert not is_passed(climb.progress.scores[-1]["exact"], EASY.marks)
    losses = [loss for _, loss in climb.progress.losses]
    assert losses[-1] < losses[0]


def test_an_interrupted_climb_ends_like_a_whole_one(tokenizer, tmp_path):
    whole = Climb(make_model(tokenizer), tokenizer, [EASY], Plan(directory=tmp_path / "whole"))
    whole.run()
    plan = Plan(directory=tmp_path / "parts")
    for _ in range(3):  # each is out of time after a step
        model = make_model(tokenizer)
        assert not Climb(model, tokenizer, [EASY], replace(plan, time_limit_s=0.0)).run()
    resumed = Climb(make_model(tokenizer), tokenizer, [EASY], plan)
    assert resumed.progress.step == 3
    assert resumed.run()
    assert resumed.progress.num_tokens == whole.progress.num_tokens
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_is_never_pickled(tokenizer, tmp_path):
    climb = Climb(make_model(tokenizer), tokenizer, [EASY], Plan(directory=tmp_path))
    climb.save()
    climb.save()  # over the first
    names = {file.name for file in (tmp_path / "latest").iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json"}


# --- the exported checkpoint -------------------------------------------------------------------


def greedy_here(out, prompts, num_tokens):
    with LLM(out, dtype="bfloat16") as llm:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        return [o.outputs[0].token_ids for o in llm.chat(prompts, params, use_tqdm=False)]


@pytest.mark.oracle
def test_transformers_says_the_same_as_we_do(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    export(make_model(tokenizer, "draft"), tokenizer, tmp_path)
    world = draw_world(3, "eval", WorldOptions())
    chats = [[user_turn(world.documents, q.text)] for q in world.questions[:3]]
    ours = greedy_here(tmp_path, chats, 12)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    for chat, tokens in zip(chats, ours, strict=True):
        ids = their_tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**ids, do_sample=False, max_new_tokens=12)
        assert answer[0, ids["input_ids"].shape[1] :].tolist() == list(tokens)


def test_measuring_reads_back_what_was_exported(tokenizer, tmp_path):
    model = make_model(tokenizer, "draft")
    export(model, tokenizer, tmp_path)
    loaded = load(tmp_path)
    for ours, theirs in zip(model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(ours.bfloat16().float(), theirs)
    batches = list(held_out(loaded.tokenizer, 20, WorldOptions(num_documents=2)))
    assert [len(sequences) for sequences in batches] == [16, 4]
    same = agreement(loaded.model, loaded.model, batches)
    assert set(same) == {asked.kind for some in batches for s in some for asked in s.asked}
    assert all(score.share == 1.0 for score in same.values())
    other = Llama(loaded.model.shape)
    torch.nn.init.normal_(other.lm_head.weight)  # or both would say the token just read
    unlike = agreement(loaded.model, other, batches).values()
    assert sum(s.num_right for s in unlike) < 0.1 * sum(s.num_asked for s in unlike)
    scores = exact(loaded.model, batches, apart=True)
    asked = sum(len(s.asked) for sequences in batches for s in sequences)
    assert sum(score.num_asked for score in scores.values()) == asked


def test_the_exported_model_is_the_trained_one(tokenizer, tmp_path):
    """Greedy text of the engine is what the torch model finds likeliest, rounded to bf16."""
    model = make_model(tokenizer, "draft")
    size = export(model, tokenizer, tmp_path)
    assert size < 3e6
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    world = draw_world(4, "eval", WorldOptions())
    question = world.questions[0]
    (tokens,) = greedy_here(tmp_path, [[user_turn(world.documents, question.text)]], 1)
    batch = make_batch([from_world(world, [question], tokenizer)])
    assert logits_of(model, batch)[0].argmax().item() == tokens[0]


# --- the draft ---------------------------------------------------------------------------------


def test_a_draft_begins_as_the_reader_and_comes_closer(tokenizer):
    reader = make_model(tokenizer, "reader")
    draft = shortened(reader)
    assert draft.shape.num_layers < reader.shape.num_layers
    ours, theirs = reader.state_dict(), draft.state_dict()
    last = f"model.layers.{draft.shape.num_layers - 1}.mlp.up_proj.weight"
    assert torch.equal(
        theirs[last], ours[f"model.layers.{reader.shape.num_layers - 1}.mlp.up_proj.weight"]
    )
    assert torch.equal(theirs["lm_head.weight"], ours["lm_head.weight"])
    torch.nn.init.normal_(draft.lm_head.weight, std=0.05)  # untrained, both say nearly the same
    steps = draw_steps(replace(ladder()[0], batch_size=4), tokenizer, torch.device("cpu"))
    losses = list(distill(reader, draft, steps, 50))
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
