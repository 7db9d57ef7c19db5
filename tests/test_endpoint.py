"""The client of an OpenAI-compatible server, and inference.py and fewshot.py with one, against servers on loopback that
fail in every way. Nothing is loaded that computes."""

import pytest
from fake_server import CUT, HANG, chat, completion, error, serving, with_logprobs

from evaluation import endpoint
from evaluation.endpoint import Endpoint, EndpointError, GivenUp, Reply

TURNS = [{"role": "user", "content": "Sentiment (negative or positive):"}]
GOOD = chat("<Judgement>positive</Judgement>")


def ask(answers, *, prompt=TURNS, number: int = 1, **how) -> tuple[list[Reply], list[float], list[dict]]:
    """The replies to so many prompts, the pauses that were made, and the requests that the server saw."""
    pauses: list[float] = []
    with serving(answers) as server:
        model = Endpoint(server.url, "m", 16, pause=pauses.append, **how)
        replies = [model.ask(prompt) for _ in range(number)]
        return replies, pauses, server.requests


def refused(answers, **how) -> str:
    with pytest.raises(EndpointError) as raised:
        ask(answers, **how)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


# ------------------------------------------------------------------------------------------------------- one reply


def test_a_chat_is_asked_greedily_and_read_whole():
    (reply,), pauses, (request,) = ask([GOOD])
    assert reply == Reply("<Judgement>positive</Judgement>", "stop", 100, 5, "fake-2026") and reply.ended
    assert request == {
        "model": "m", "messages": TURNS, "max_tokens": 16, "temperature": 0.0, "logprobs": True, "top_logprobs": 20
    }  # fmt: skip
    assert pauses == []


def test_a_text_is_continued_by_the_other_route():
    (reply,), _, (request,) = ask([completion("positive</", "length")], prompt="Prompt: ...<Judgement>")
    assert (reply.text, reply.ended) == ("positive</", False)
    assert (request["prompt"], request["logprobs"]) == ("Prompt: ...<Judgement>", 5) and "messages" not in request


def test_the_key_of_the_environment_is_sent_and_a_placeholder_without_one(monkeypatch):
    with serving(lambda path, request: GOOD) as server:
        Endpoint(server.url, "m", 16).ask(TURNS)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        Endpoint(server.url, "m", 16).ask(TURNS)
        assert server.keys == ["Bearer none", "Bearer sk-secret"]


def test_candidates_of_every_token_are_read_in_both_forms():
    top = {"pos": -0.1, "neg": -2.5}
    (reply,), _, _ = ask([with_logprobs(chat("pos"), ("pos", top))])
    assert reply.candidates == (("pos", top),)
    body = completion("pos")
    body["choices"][0]["logprobs"] = {"tokens": ["pos"], "token_logprobs": [-0.1], "top_logprobs": [top]}
    (reply,), _, _ = ask([body], prompt="x")
    assert reply.candidates == (("pos", top),)


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": [{}]}, {"content": [{"token": 1}]}, "x"])
def test_log_probabilities_that_are_absent_or_odd_are_none(logprobs):
    body = chat("positive")
    body["choices"][0]["logprobs"] = logprobs
    assert ask([body])[0][0].candidates == ()


@pytest.mark.parametrize(
    ("body", "text", "ended"),
    [
        (chat(None), "", True),
        (chat(None, refusal="I cannot help with that."), "I cannot help with that.", True),
        (chat(None, "content_filter"), "", False),
        (chat("", "length", None), "", False),
        ({"choices": [{"message": {"content": "yes"}}]}, "yes", True),
    ],
)
def test_a_null_a_refusal_and_a_filter_are_answers(body, text, ended):
    (reply,), _, _ = ask([body])
    assert (reply.text, reply.ended) == (text, ended)


def test_a_prompt_that_a_filter_refuses_is_an_answer_too():
    (reply,), pauses, _ = ask([error(400, "The prompt was filtered.", "content_filter")])
    assert (reply.text, reply.ended, pauses) == ("", False, [])


def test_tokens_that_are_not_counted_are_unknown():
    (reply,), _, _ = ask([chat("yes", tokens=None)])
    assert (reply.input_tokens, reply.output_tokens) == (None, None)


# ------------------------------------------------------------------------------------------------------ further tries


def test_pauses_double_up_to_a_minute_and_then_it_is_given_up():
    limited = error(429, "Rate limit reached.")
    said = refused([limited] * endpoint.ATTEMPTS)
    assert "refuses more requests 8 times (Rate limit reached.); lower --concurrency, or go on later" in said
    _, pauses, requests = ask([limited] * 7 + [GOOD])
    bounds = [0.5, 1, 2, 4, 8, 16, 32]
    assert len(requests) == 8 and all(0.75 * most <= pause <= most for pause, most in zip(pauses, bounds, strict=True))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry_after": "7"}, 7.0), ({"retry_after_ms": "1500"}, 1.5), ({"retry_after": "soon"}, 0.5)],
)
def test_a_server_says_how_long_to_wait(headers, seconds):
    _, (pause,), _ = ask([error(429, "Slow down.", **headers), GOOD])
    assert 0.75 * seconds <= pause <= seconds


def test_a_date_to_wait_for_is_read(monkeypatch):
    monkeypatch.setattr(endpoint.time, "time", lambda: 784887151.0)  # Tue, 15 Nov 1994 08:12:31 GMT
    _, (pause,), _ = ask([error(503, "Busy.", retry_after="Tue, 15 Nov 1994 08:12:41 GMT"), GOOD])
    assert pause == 10.0


def test_nobody_waits_for_tomorrow_or_for_money():
    said = refused([error(429, "Daily limit.", retry_after="7200")])
    assert "(Daily limit.); lower --concurrency, or go on in 7200 s, as it asks" in said
    assert "(You have no credit.)" in refused([error(429, "You have no credit.", "insufficient_quota")])


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529, 408, 409])
def test_an_overloaded_server_is_asked_again(status):
    replies, pauses, _ = ask([error(status, "Overloaded."), GOOD])
    assert replies[0].text and len(pauses) == 1


@pytest.mark.parametrize("fault", [CUT, b"<html>Bad gateway</html>", b"", {"choices": []}, {"error": "upstream"}])
def test_a_hiccup_between_good_answers_is_overcome(fault):
    replies, pauses, requests = ask([GOOD, fault, fault, GOOD], number=2)
    assert replies[0] == replies[1] and len(pauses) == 2 and len(requests) == 4


def test_a_server_that_is_silent_for_too_long_is_asked_again(monkeypatch):
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.2)
    replies, pauses, _ = ask([GOOD, HANG, GOOD], number=2)
    assert replies[0] == replies[1] and len(pauses) == 1


def test_who_waits_is_woken_when_the_run_ends():
    with serving([GOOD, *[error(503, "Busy.", retry_after="100")] * 2]) as server:
        model = Endpoint(server.url, "m", 16)
        model.ask(TURNS)
        model.give_up()
        with pytest.raises(GivenUp):
            model.ask(TURNS)


# ------------------------------------------------------------ parameters that a server does not take


def test_parameters_that_a_server_does_not_take_are_left_out_from_then_on(capsys):
    answers = [
        error(400, "Use 'max_completion_tokens' instead of 'max_tokens'.", "unsupported_parameter", "max_tokens"),
        error(400, "top_logprobs must be at most 5.", None, "top_logprobs"),
        error(422, "logprobs is not supported with this model"),
        error(400, "Only the default (1) value is supported.", "unsupported_value", "temperature"),
        error(400, "Unknown parameter: 'seed'."),
        GOOD,
        GOOD,
    ]
    replies, pauses, requests = ask(answers, number=2, seed=1)
    assert len(replies) == 2 and pauses == []
    assert requests[-1] == requests[-2] == {"model": "m", "messages": TURNS, "max_completion_tokens": 16}
    assert [request.get("top_logprobs") for request in requests] == [20, 20, 5, None, None, None, None]
    assert capsys.readouterr().out.splitlines() == [
        "m takes no temperature: its answers are sampled as the server does it.",
        "m takes no seed: its answers are sampled as the server does it.",
    ]


def test_a_row_that_is_too_long_is_named():
    said = "This model's maximum context length is 2048 tokens; your messages have 2900."
    with serving([GOOD, error(400, said, "context_length_exceeded", "messages")]) as server:
        model = Endpoint(server.url, "m", 16)
        model.ask(TURNS)
        with pytest.raises(EndpointError, match=r"answers 400 to row 7 of RTE: This model's maximum context"):
            model.ask(TURNS, "row 7 of RTE")


# ------------------------------------------------------------------------------------------------------- clear errors


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            b"<html><body>Welcome to nginx!</body></html>",
            "answers nonsense: no JSON but '<html><body>Welcome to nginx!",
        ),
        (b"", "answers nonsense: no JSON but ''"),
        (b"\xff\xfe\x00", "answers nonsense: no JSON"),
        (b"[]", "answers nonsense: no choices with a text but '[]'"),
        (b"null", "no choices with a text but 'null'"),
        ({"choices": []}, "no choices with a text"),
        ({"choices": None}, "no choices with a text"),
        ({"choices": [{"message": None}]}, "no choices with a text"),
        ({"choices": [{"message": {"content": 7}}]}, "no choices with a text"),
        ({"choices": [{"message": {"content": "yes"}}], "usage": []}, ""),
        ({"error": {"message": "no upstream"}}, 'no choices with a text but \'{"error": {"message": "no upstream"}}'),
        (CUT, "cannot be reached"),
        (error(400, "Bad\nrequest."), "answers 400: Bad request."),
        (error(401, "No key."), "asks for a key (No key.); set OPENAI_API_KEY in the environment"),
        ((418, {"detail": "teapot"}, {}), "answers 418: teapot"),
        ((400, b"plain words", {"content-type": "text/plain"}), "answers 400: plain words"),
    ],
)
def test_what_a_server_does_wrong_is_one_sentence(answer, said):
    if said:
        assert said in refused([answer])
    else:
        ask([answer])


def test_a_server_that_stays_broken_is_given_up_soon():
    said = refused([error(500, "Out of memory.")] * endpoint.FIRST_ATTEMPTS)
    assert said.endswith("answers 500 3 times: Out of memory.")
    said = refused([GOOD] + [error(500, "Out of memory.")] * endpoint.ATTEMPTS, number=2)
    assert said.endswith("answers 500 8 times: Out of memory.")


def test_a_key_that_is_refused_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    said = refused([error(401, "Incorrect API key provided: sk-secret.")])
    assert "refuses the key of OPENAI_API_KEY (Incorrect API key provided: OPENAI_API_KEY.)" in said


def test_an_unknown_model_is_told_with_those_that_are_there():
    def answer(path, request):
        known = {"object": "list", "data": [{"id": "b"}, {"id": "a/b:c"}]}
        return known if path.endswith("/models") else error(404, "The model 'm' does not exist.", "model_not_found")

    said = refused(answer)
    assert (
        "answers 404 (The model 'm' does not exist.); --train_model_name m must be one of its models: a/b:c, b" in said
    )


def test_a_wrong_path_is_told_with_the_usual_one():
    said = refused(lambda path, request: (404, b"Not Found", {"content-type": "text/plain"}))
    assert "answers 404 (Not Found); give the base URL of an OpenAI-compatible API, as a rule .../v1" in said


def test_a_port_where_nobody_listens():
    with serving([]) as server:
        url = server.url
    with pytest.raises(EndpointError, match=r"cannot be reached \(.*\); start the server, or correct the URL"):
        Endpoint(url, "m", 16).ask(TURNS)
