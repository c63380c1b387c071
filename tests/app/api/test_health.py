from collections.abc import Callable

import pytest

from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]


def test_a_healthy_service_says_so(api: Api) -> None:
    assert api.http.get("/health/live").json() == {"status": "alive"}
    assert api.http.get("/health/ready").json() == {"status": "ready"}
    assert api.http.get("/health").status_code == 200


def test_a_stopped_engine_is_not_ready_and_refuses(start: StartApi) -> None:
    api = start()
    api.engine._accepting = False
    for answer in (api.http.get("/health/ready"), api.http.post("/embed", files=multipart([photo(1)]))):
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert int(answer.headers["Retry-After"]) > 0
    assert api.http.get("/health/live").status_code == 200  # a supervisor must not restart what drains


def test_a_dead_thread_is_not_alive(start: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    api = start()
    monkeypatch.setattr(type(api.engine), "alive", property(lambda _: False))
    assert api.http.get("/health/live").status_code == 503


def test_metrics_tell_of_images_requests_and_the_model(start: StartApi) -> None:
    api = start()
    api.http.post("/embed", files=multipart([photo(1), photo(2), b"text"]))
    answer = api.http.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert 'dino_serve_images_total{model="tiny",outcome="embedded"} 2.0' in lines
    assert 'dino_serve_images_total{model="tiny",outcome="failed"} 1.0' in lines
    assert 'dino_serve_image_errors_total{model="tiny",reason="unsupported_format"} 1.0' in lines
    assert 'dino_serve_requests_total{code="200",route="/embed"} 1.0' in lines
    assert 'dino_serve_ready{model="tiny"} 1.0' in lines
    fingerprint = api.bundle.manifest.fingerprint
    (line,) = [line for line in lines if line.startswith("dino_serve_model_info{")]
    assert all(part in line for part in ('backend="torch"', f'fingerprint="{fingerprint}"', 'model="tiny"'))


def test_two_services_in_one_process_count_for_themselves(start: StartApi, api: Api) -> None:
    api.http.post("/embed", files=multipart([photo(1)]))
    fresh = start()
    assert 'images_total{model="tiny",outcome="embedded"} 0.0' in fresh.http.get("/metrics").text


def test_info_says_what_a_client_must_know(api: Api) -> None:
    info = api.http.get("/info").json()
    assert info["model"]["fingerprint"] == api.bundle.manifest.fingerprint
    assert info["model"]["preprocessing"]["crop_px"] == info["model"]["input_px"] == 32
    assert info["limits"]["images_per_request"] == 256
    assert info["limits"]["request_bytes"] == 100 * 2**20
    assert "JPEG" in info["formats"]
