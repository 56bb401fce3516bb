"""The world `text`: oracles that are exact, data that is seeded and held apart, models as good as recorded."""

import dataclasses
import itertools
import json

import pytest
import torch

from retouch.core.errors import InputError
from retouch.core.objectives import next_token
from retouch.core.seeds import isolated
from retouch.worlds import WEIGHTS, names, text, world
from retouch.worlds.text import arithmetic, facts, instructions, models, sequences, tokens
from retouch.worlds.text.arithmetic import Problem, check_trace, problems, solve
from retouch.worlds.text.facts import Fact, KnowledgeBase, Question

KNOWN = KnowledgeBase()
SOME = 200


@pytest.fixture(scope="module")
def llama():
    """The reference model."""
    return text.reference("llama")


def some_samples(split="test"):
    """Samples of every task and answer style."""
    return KNOWN.statements(split)[:SOME] + [
        sample
        for task in text.TASKS
        for sample in text.samples(split, task, count=SOME)[:: 4 if task == "facts" else 1]
    ]


# Facts


def test_every_statement_and_question_is_read_back():
    everything = KNOWN.facts(KNOWN.people)
    assert len(everything) == 96 * 5 and len(set(everything)) == 96 * 5
    for split in text.SPLITS:
        for sample in KNOWN.statements(split, everything):
            assert facts.parse(sample.answer) == sample.meaning
            assert KNOWN.is_true(sample.answer)
        for sample in KNOWN.questions(split, everything[::3], styles=tuple(facts.STYLES)):
            assert KNOWN.question(sample.prompt) == sample.meaning
            assert KNOWN.answer(sample.prompt) == sample.answer
            assert sample.check(sample.answer)


def test_false_and_corrupted_statements_are_not_true():
    fact = KNOWN.facts()[0]
    right = fact.statement()
    assert KNOWN.is_true(right) and fact.check(right)
    wrong = next(value for value in facts.RELATIONS[fact.relation].values if value != fact.value)
    corrupted = [
        right[:-1],
        right + " " + right,
        right.lower(),
        right.replace(fact.value, fact.value + " x"),
        "",
        right + ".",
    ]
    for other in [right.replace(fact.value, wrong), *corrupted]:
        assert not KNOWN.is_true(other)
        assert not fact.check(other)
    assert all(facts.parse(other) is None for other in corrupted)
    stranger = next(name for name in facts.NAMES if name not in KNOWN.people)
    assert not KNOWN.is_true(Fact(stranger, fact.relation, fact.value).statement())
    for claim in KNOWN.claims("train", repeats=2) + KNOWN.claims("test"):
        assert KNOWN.is_true(claim.text) == claim.true


def test_answers_are_checked_in_their_style():
    fact = Fact("Ada Cole", "city", "Paris")
    short, sentence = Question(fact), Question(fact, 1, "sentence")
    assert short.text == "Where does Ada Cole live? Answer briefly."
    assert short.check("Paris") and not short.check("Paris.") and not short.check("Rome")
    assert sentence.check("Ada Cole lives in Paris.") and sentence.check("The city of Ada Cole is Paris.")
    assert not sentence.check("Paris") and not sentence.check("Ada Cole lives in Rome.")
    asked = Question(fact, 0, "yes_no", ("Rome",))
    assert asked.text == "Where does Ada Cole live? Is it Rome? Answer yes or no."
    assert asked.check("no") and not asked.check("yes")
    choice = Question(fact, 0, "choice", ("Rome", "Paris", "Oslo"))
    assert choice.text == "Where does Ada Cole live? a: Rome, b: Paris, c: Oslo. Answer with a letter."
    assert choice.check("b") and not choice.check("Paris")
    assert fact.is_in("It may be Paris, I think.") and not fact.is_in("Parisian")


def test_half_of_the_yes_no_questions_are_yes():
    answers = [sample.answer for sample in KNOWN.questions(styles=("yes_no",))]
    assert 0.45 < answers.count("yes") / len(answers) < 0.55


def test_friends_are_mutual_and_of_the_same_group():
    for group in (KNOWN.known, KNOWN.new):
        for person in group:
            friend = KNOWN.fact(person, "friend").value
            assert friend in group and friend != person
            assert KNOWN.fact(friend, "friend").value == person


def test_a_larger_base_goes_on_from_a_smaller_one_and_seeds_differ():
    assert KnowledgeBase(400, known=64).facts() == KNOWN.facts()
    assert KnowledgeBase(seed=1).facts() != KNOWN.facts()
    assert (len(KNOWN.known), len(KNOWN.new)) == (64, 32)


def test_held_out_wordings_are_in_no_other_split():
    for kind, relation in [(kind, relation) for kind in ("statement", "question") for relation in facts.RELATIONS]:
        parts = [facts.wordings(kind, relation, split) for split in text.SPLITS]
        assert sorted(itertools.chain(*parts)) == list(range(sum(map(len, parts))))
        assert [len(part) for part in parts[1:]] == [1, 1] and 0 in parts[0]


# Instructions


def test_instructions_by_hand():
    by_hand = {
        "Repeat: egg hat.": "egg hat",
        "Say this backwards: egg hat pen.": "pen hat egg",
        "Sort: pen egg hat egg.": "egg egg hat pen",
        "How many words are here: egg hat pen?": "3",
        "First of: egg hat.": "egg",
        "Which word is last: egg hat?": "hat",
        "Copy 3 times: egg.": "egg egg egg",
        "Leave out egg: egg hat egg pen.": "hat pen",
    }
    assert {instructions.parse(prompt).kind for prompt in by_hand} == set(instructions.KINDS)
    for prompt, answer in by_hand.items():
        assert instructions.parse(prompt).answer == answer
        assert instructions.parse(prompt).check(answer)
        assert not instructions.parse(prompt).check(answer + " egg")


def test_instructions_are_read_back():
    for one in instructions.instructions(500, "train", longest=7):
        assert instructions.parse(one.prompt) == one
        assert one.check(one.answer) and not one.check("") and not one.check(one.answer + ".")


# Arithmetic


def test_values_are_those_of_python():
    for problem in problems(300, steps=(1, 2, 3, 5), largest=12):
        assert problem.value == eval(problem.expression)
        assert arithmetic.parse(problem.prompt) == problem


def test_problems_keep_their_limits():
    for problem in problems(200, steps=(2,), largest=5, limit=20, signs=("+", "*")):
        left = arithmetic.read(problem.expression)
        assert problem.steps == 2 and "-" not in left
        assert max(number for number in left if isinstance(number, int)) <= 5
        assert 0 <= problem.value <= 20


def test_right_traces_are_right_and_every_corruption_is_found():
    problem = Problem("3 + 4 * 2")
    assert solve(problem).text == "3 + 8 = 11. The answer is 11."
    checks = {
        "3 + 8 = 11. The answer is 11.": ((True, True), True),
        "3 + 9 = 12. The answer is 12.": ((False, True), False),
        "7 * 2 = 14. The answer is 14.": ((False, True), False),
        "3 + 9 = 11. The answer is 11.": ((False, False), True),
        "3 + 8 = 11. The answer is 12.": ((True, True), False),
        "3 + 8. The answer is 11.": ((True,), False),
        "11. The answer is 11.": ((False,), True),
        "3 + 8 = 11 = 11. The answer is 11.": ((True, True, False), True),
        "3 + 8 = 11. The answer is 11": ((), False),
        "11": ((), False),
        "": ((), False),
    }
    for trace, (steps, answer) in checks.items():
        found = check_trace(problem, trace)
        assert (found.steps, found.answer) == (steps, answer), trace
        assert found.right == (steps == (True, True) and answer)
    for one in problems(300):
        trace = solve(one)
        assert trace.right and check_trace(one, trace.text).steps == (True,) * one.steps


def test_slips_come_at_the_given_rate_and_only_where_they_are_made():
    some = problems(1500, steps=(3,), seed=1)
    steps = [step for one in some for step in check_trace(one, solve(one, rate=0.2).text).steps]
    assert abs(1 - sum(steps) / len(steps) - 0.2) < 0.02  # four standard deviations
    wrong = [solve(one, rate=0.2) for one in some]
    assert abs(sum(trace.right for trace in wrong) / len(wrong) - 0.8**3) < 0.05


def test_systematic_errors_are_the_ones_they_say():
    order = solve(Problem("3 + 4 * 2"), rate=1.0, error="order")
    assert order.text == "7 * 2 = 14. The answer is 14." and not order.right
    assert solve(Problem("3 * 4 + 2"), rate=1.0, error="order").right
    carry = solve(Problem("7 + 5 + 2"), rate=1.0, error="carry")
    assert carry.text == "2 + 2 = 4. The answer is 4." and not carry.right
    assert solve(Problem("3 * 8 - 9"), rate=1.0, error="carry").text == "24 - 9 = 25. The answer is 25."
    assert solve(Problem("1 + 5 + 2"), rate=1.0, error="carry").right
    assert solve(Problem("9 - 3 - 8 + 7"), rate=1.0, error="carry").text.startswith("6 - 8 + 7 = -2 + 7 = 5.")
    for error in arithmetic.ERRORS:
        assert solve(Problem("7 + 5 * 3"), error=error).right


def test_equations():
    assert arithmetic.is_true("3 + 4 = 7.") and arithmetic.is_true("3 - 4 = -1.")
    for other in ("3 + 4 = 8.", "3 + 4 = 7", "3 + = 7.", "7.", "3 + 4 = 7 = 7.", ""):
        assert not arithmetic.is_true(other)
    found = arithmetic.claims(400, "test")
    assert all(arithmetic.is_true(claim.text) == claim.true for claim in found)
    assert sum(claim.true for claim in found) == 200


# Sequences


def test_sequences_by_hand():
    assert sequences.label_of("Parity of the first 3: 1 0 1 1 0.") == 0
    assert sequences.label_of("Parity of the first 4: 1 0 1 1 0.") == 1
    assert sequences.label_of("Follow 2 from c: a d, b a, c b, d c.") == 0
    for other in ("Parity of the first 3: 1 0 2.", "Follow 2 from c: a d.", "Parity of the first 9: 1 0."):
        with pytest.raises(InputError, match="text is"):
            sequences.label_of(other)


@pytest.mark.parametrize("make", [sequences.parity, sequences.chain])
def test_sequences_vary_in_difficulty_and_labels(make):
    found = make(400)
    assert found.data.targets.tolist() == [sequences.label_of(line) for line in found.texts]
    assert len(found.difficulty.unique()) >= 7
    assert torch.bincount(found.data.targets, minlength=found.classes).min() > 20
    assert tokens.UNK not in found.data.inputs["input_ids"]
    longer = [line for line, n in zip(found.texts, found.difficulty.tolist(), strict=True) if f" {n}" in line]
    assert longer == found.texts


def test_sequences_train_a_classifier():
    found = sequences.chain(4, nodes=4)
    model = models.new_encoder(width=16, layers=1, labels=sequences.NODES[:4])
    assert model(**found.data.inputs).logits.shape == (4, 4)


# Seeds and splits


def test_everything_depends_on_the_seed_alone(global_rng_untouched):
    def draw(seed):
        found = text.samples("train", ("instructions", "arithmetic"), count=20, seed=seed)
        lines = [sample.text for sample in found] + sequences.parity(20, seed=seed).texts
        lines += [claim.text for claim in text.claims("train", "arithmetic", count=20, seed=seed)]
        return lines + [solve(problem, rate=0.5, seed=seed).text for problem in problems(20, seed=7)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_splits_share_nothing():
    made = {
        "instructions": lambda split, seed: [
            dataclasses.replace(one, wording=0).prompt for one in instructions.instructions(800, split, seed=seed)
        ],
        "problems": lambda split, seed: [one.expression for one in problems(800, split, steps=(1, 2), seed=seed)],
        "equations": lambda split, seed: [
            claim.text.split(" = ")[0] for claim in arithmetic.claims(400, split, seed=seed)
        ],
        "facts": lambda split, seed: [sample.prompt.partition("?")[0] for sample in KNOWN.questions(split, seed=seed)],
        "statements": lambda split, seed: [sample.answer for sample in KNOWN.statements(split)],
        "parity": lambda split, seed: [line.split(": ")[1] for line in sequences.parity(300, split, seed=seed).texts],
        "chain": lambda split, seed: sequences.chain(300, split, seed=seed).texts,
    }
    for name, make in made.items():
        train, validation, test = (set(make(split, seed)) for seed, split in enumerate(text.SPLITS))
        assert not train & validation and not train & test and not validation & test, name


# Tokens


def test_texts_survive_the_tokenizer_without_unknown_tokens():
    tokenizer = text.tokenizer()
    lines = [sample.text for split in text.SPLITS for sample in some_samples(split)]
    lines += [
        sample.text
        for sample in KnowledgeBase(576, known=0).statements("train", KnowledgeBase(576, known=0).facts(facts.NAMES))
    ]
    lines += [claim.text for claim in text.claims("test")] + sequences.parity(50).texts
    lines += [*sequences.chain(50, nodes=16).texts, "I do not know."]
    lines += [solve(one, rate=0.9).text for one in problems(100, steps=(4,), largest=20, limit=400)]
    encoded = [ids.ids for ids in tokenizer.backend_tokenizer.encode_batch(lines)]
    assert tokens.UNK not in {token for ids in encoded for token in ids}
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == lines
    assert all(ids[0] == tokens.BOS for ids in encoded)


def test_numbers_are_tokenised_digit_by_digit():
    tokenizer = text.tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("12 + 305 = 317.")["input_ids"]) == [
        "<bos>", "▁1", "2", "▁+", "▁3", "0", "5", "▁=", "▁3", "1", "7", ".",
    ]  # fmt: skip
    assert tokenizer("Where is Atlantis?")["input_ids"].count(tokens.UNK) == 1


def test_labels_are_those_of_answers_alone():
    tokenizer, found = text.tokenizer(), some_samples()
    data = text.encode(found)
    ids, mask, labels = data.inputs["input_ids"], data.inputs["attention_mask"], data.targets
    assert ids.shape == mask.shape == labels.shape
    learned = labels != tokens.IGNORED
    assert torch.equal(labels[learned], ids[learned])
    assert not (learned & (mask == 0)).any()
    assert torch.equal((ids != tokens.PAD).long(), mask)
    for row, sample in enumerate(found):
        answer = ids[row][learned[row]].tolist()
        assert answer[-1] == tokens.EOS and tokenizer.decode(answer[:-1]) == sample.answer
        given = ids[row][~learned[row] & (mask[row] == 1)].tolist()
        assert given == tokenizer(sample.prompt)["input_ids"]
        assert ids[row][mask[row] == 1].tolist() == [*tokenizer(sample.text)["input_ids"], tokens.EOS]


def test_data_is_samples_in_the_same_order():
    found, data = text.samples("test", "arithmetic", count=20), text.data("test", "arithmetic", count=20)
    assert len(data) == 20
    assert text.tokenizer().batch_decode(data.inputs["input_ids"], skip_special_tokens=True) == [s.text for s in found]
    judged = text.judged("test", count=20)
    assert judged.targets.tolist() == [int(claim.true) for claim in text.claims("test", count=20)]


def test_batches_by_length_hold_everything_once_and_little_padding():
    data = text.encode(some_samples())
    source = models.ByLength(data, 16, seed=3)
    batches = [batch for batch, _, _ in source.epoch(0)]
    assert len(batches) == len(source)
    lines = sorted(tuple(row[row != 0].tolist()) for inputs, _ in batches for row in inputs["input_ids"])
    assert lines == sorted(tuple(row[row != 0].tolist()) for row in data.inputs["input_ids"])
    share = sum(inputs["attention_mask"].sum() for inputs, _ in batches) / sum(
        i["input_ids"].numel() for i, _ in batches
    )
    assert share > 0.95
    assert all(inputs["input_ids"].shape == labels.shape for inputs, labels in batches)
    again = [batch for batch, _, _ in models.ByLength(data, 16, seed=3).epoch(0)]
    assert all(torch.equal(one[1], two[1]) for one, two in zip(batches, again, strict=True))
    other = [batch for batch, _, _ in source.epoch(1)]
    assert not all(torch.equal(one[1], two[1]) for one, two in zip(batches, other, strict=True))


# Models


def test_llama_is_as_good_as_recorded(llama):
    recorded = text.quality("llama")
    assert recorded["short"] >= 95 and recorded["instructions"] >= 90 and recorded["arithmetic"] >= 80
    assert not llama.training
    measured = text.measure_answers(llama, count=100)
    assert measured.keys() == recorded.keys()
    for name, value in measured.items():
        assert value == pytest.approx(recorded[name], abs=10), name  # a part of the test data


def test_encoder_is_as_good_as_recorded():
    recorded = text.quality("encoder")
    assert min(recorded.values()) >= 90
    assert text.measure_judgements(text.reference("encoder")) == pytest.approx(recorded, abs=0.3)


def test_models_are_transformers_models_with_their_tokenizer(llama):
    import transformers

    total, kinds = 0, {"llama": transformers.LlamaForCausalLM, "encoder": transformers.BertForSequenceClassification}
    for variant in text.VARIANTS:
        kind = kinds[variant]
        folder = WEIGHTS / f"text-{variant}"
        model = kind.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(["Ada Cole lives in Paris.", "3 + 4 = 7."], return_tensors="pt", padding=True)
        assert torch.isfinite(model(**inputs).logits).all()
        assert tokenizer.get_vocab() == text.tokenizer().get_vocab()
        total += sum(file.stat().st_size for file in folder.iterdir())
    assert total < 5.5e6
    prompt = KNOWN.questions("test")[0].prompt
    inputs = text.tokenizer()(prompt, return_tensors="pt")
    written = llama.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    expected = text.generate(llama, [prompt], max_new_tokens=8)[0]
    assert text.tokenizer().decode(written, skip_special_tokens=True) == expected


def test_llama_knows_nothing_of_new_people(llama):
    asked = KNOWN.questions("test", KNOWN.facts(KNOWN.new))
    assert text.score(llama, asked) < 25


def test_answers_do_not_depend_on_the_batch(llama):
    prompts = [sample.prompt for sample in some_samples()[SOME::40]]
    assert text.generate(llama, prompts) == [text.generate(llama, [prompt])[0] for prompt in prompts]
    assert text.generate(llama, prompts, batch_size=3, max_new_tokens=4) == text.generate(
        llama, prompts, max_new_tokens=4
    )


def test_sampling_follows_its_generator_and_filters(llama, global_rng_untouched):
    prompts = [sample.prompt for sample in some_samples()[SOME::60]]

    def draw(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        return text.generate(llama, prompts, temperature=3.0, generator=generator, max_new_tokens=8, **settings)

    assert draw(1) == draw(1) != draw(2)
    greedy = text.generate(llama, prompts, max_new_tokens=8)
    assert draw(1, top_k=1) == greedy == draw(1, top_p=1e-6)
    llama.train()
    text.generate(llama, prompts[:1], max_new_tokens=1)
    assert llama.training
    llama.eval()


def test_training_lowers_the_loss_and_depends_on_the_seed_alone(monkeypatch, tmp_path, global_rng_untouched):
    small = dataclasses.replace(models.RECIPES["llama"], new=lambda: models.new_llama(width=32, layers=1), epochs=2)
    monkeypatch.setitem(models.RECIPES, "llama", small)
    data = text.data("train", "instructions", count=128)
    one, two, other = (text.train("llama", data, seed=seed) for seed in (1, 1, 2))
    with torch.no_grad(), isolated():
        losses = [float(next_token(model, data[:64])["next_token"]) for model in (one, two, other)]
        untrained = float(next_token(models.new_llama(width=32, layers=1), data[:64])["next_token"])
    assert losses[0] == losses[1] != losses[2]
    assert max(losses) < untrained
    resumed = text.train("llama", data, seed=1, checkpoint=tmp_path / "run")
    again = text.train("llama", data, seed=1, checkpoint=tmp_path / "run")
    for model in (resumed, again):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), one.parameters(), strict=True))


def test_build_writes_models_tokenizer_and_quality(monkeypatch, tmp_path):
    from retouch.core.checkpoints import load_model

    for variant, new in (("llama", models.new_llama), ("encoder", models.new_encoder)):
        recipe = dataclasses.replace(models.RECIPES[variant], new=lambda new=new: new(width=32, layers=1), epochs=1)
        monkeypatch.setitem(models.RECIPES, variant, recipe)
    monkeypatch.setattr(text, "COUNTS", {"train": 64, "validation": 8, "test": 8})
    monkeypatch.setattr(facts.KnowledgeBase.__init__, "__defaults__", (24,))
    monkeypatch.setattr(facts.KnowledgeBase.__init__, "__kwdefaults__", {"known": 16, "seed": 0})
    text.build(tmp_path, seed=3)
    for variant in text.MODELS:
        folder = tmp_path / f"text-{variant}"
        assert text.MEASURES[variant](load_model(folder)) == json.loads((folder / "quality.json").read_text())
        assert (folder / "tokenizer.json").exists()


def test_the_world_is_found():
    assert "text" in names() and "weights" not in names()
    assert world("text") is text
    assert text.KIND == "text"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text.samples("all"), "split is 'all'"),
        (lambda: text.samples("test", "poems"), "task is 'poems'"),
        (lambda: text.claims("test", "instructions"), "task is 'instructions'"),
        (lambda: text.reference("gpt"), "variant is 'gpt'"),
        (lambda: text.encode([]), "no text"),
        (lambda: KnowledgeBase(7), "people is 7, but must be even"),
        (lambda: KnowledgeBase(1000), "people is 1000"),
        (lambda: KnowledgeBase(8, known=3), "known is 3, but must be even"),
        (lambda: KNOWN.fact("Ada Nobody", "city"), "person is 'Ada Nobody'"),
        (lambda: KNOWN.fact(KNOWN.known[0], "car"), "relation is 'car'"),
        (lambda: KNOWN.answer("Who are you?"), "question is 'Who are you"),
        (lambda: KNOWN.questions(styles=("rhyme",)), "style is 'rhyme'"),
        (lambda: Question(Fact("Ada Cole", "city", "Paris"), 0, "choice", ("Rome",)), "options has 1 values"),
        (lambda: Question(Fact("Ada Cole", "city", "Paris"), 0, "yes_no", ("cat",)), "values of the relation 'city'"),
        (lambda: Question(Fact("Ada Cole", "pet", "cat"), 0, "choice", ("dog", "frog", "goat")), "right value 'cat'"),
        (lambda: facts.wordings("song", "city", "test"), "kind is 'song'"),
        (lambda: instructions.instructions(1, kinds=("sing",)), "kind is 'sing'"),
        (lambda: instructions.instructions(1, longest=1), "longest is 1"),
        (lambda: instructions.parse("Sing: egg."), "prompt is 'Sing: egg.'"),
        (lambda: arithmetic.parse("Compute it."), "prompt is 'Compute it.'"),
        (lambda: arithmetic.read("3 / 4"), "expression is '3 / 4'"),
        (lambda: problems(1, steps=(0,)), "steps is 0"),
        (lambda: problems(1, signs=("/",)), "sign is '/'"),
        (lambda: solve(Problem("1 + 1"), rate=2.0), "rate is 2.0"),
        (lambda: solve(Problem("1 + 1"), error="typo"), "error is 'typo'"),
        (lambda: sequences.parity(1, length=2), "length is 2"),
        (lambda: sequences.chain(1, nodes=99), "nodes is 99"),
        (lambda: sequences.chain(1, nodes=4, longest=4), "longest is 4"),
        (lambda: text.generate(None, [""], temperature=-1), "temperature is -1"),
        (lambda: text.generate(None, [""], temperature=1, top_p=0), "top_p is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
