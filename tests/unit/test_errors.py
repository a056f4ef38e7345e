from __future__ import annotations

from advisor import errors


def test_suggestions_keep_the_spelling_of_the_known_name():
    assert errors.did_you_mean("llamaforcasuallm", ["LlamaForCausalLM", "GPT2"]) == (
        " Did you mean 'LlamaForCausalLM'?"
    )
    assert errors.did_you_mean("zzz", ["gptq", "awq"]) == ""
    assert errors.did_you_mean("int", ["int4", "int8", "int3", "int2"], most=2).count(" or ") == 1


def test_one_complaint_is_a_sentence_several_are_a_list():
    assert errors.join_errors(["a is wrong."]) == "a is wrong."
    assert errors.join_errors(["a.", "b."]) == "2 problems:\n  - a.\n  - b."


def test_exit_codes():
    codes = {kind: kind.exit_code for kind in errors.AdvisorError.__subclasses__()}
    assert codes == {
        errors.InputError: 2,
        errors.InfeasibleError: 3,
        errors.VerificationError: 1,
        errors.BackendError: 1,
    }


def test_of_many_complaints_the_number_is_right():
    text = errors.join_errors([f"fault {index}" for index in range(12)], 10)
    assert text.splitlines()[0] == "12 problems:"
    assert text.splitlines()[-2:] == ["  - fault 9", "  - ... and 2 more"]
    assert errors.join_errors(["a", "b"], 2) == "2 problems:\n  - a\n  - b"
