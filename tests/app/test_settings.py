from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import IndexAddSettings, ModelSource, Settings, SettingsInvalid, load


@pytest.fixture(autouse=True)
def no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"DINO_SERVE_{name.upper()}", raising=False)


def load_run(*arguments: str) -> Settings:
    return load(Settings, arguments, prog="dino-serve run")


def test_the_defaults_serve_this_machine_only() -> None:
    settings = load_run()
    assert (settings.host, settings.port, settings.is_loopback) == ("127.0.0.1", 8000, True)
    assert settings.api_key_file is None
    assert settings.insecure is False


def test_a_flag_goes_before_the_environment_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('port = 1\nmax_batch_size = 2\nlog_level = "error"\n')
    monkeypatch.setenv("DINO_SERVE_PORT", "10")
    monkeypatch.setenv("DINO_SERVE_MAX_BATCH_SIZE", "20")
    settings = load_run("--config", str(file), "--port", "100")
    assert (settings.port, settings.max_batch_size, settings.log_level) == (100, 20, "error")


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("port = 1\n")
    monkeypatch.setenv("DINO_SERVE_CONFIG", str(file))
    assert load_run().port == 1
    assert load_run(f"--config={file}").port == 1


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_run().port = 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
def test_this_machines_own_addresses_need_no_key(host: str) -> None:
    assert load_run("--host", host).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "photos.example"])
def test_other_addresses_need_a_key_or_a_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="--api-key-file FILE, or say --insecure"):
        load_run("--host", host)
    assert load_run("--host", host, "--insecure").host == host
    assert load_run("--host", host, "--api-key-file", str(tmp_path / "keys")).host == host


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param("prot = 1\n", "there is no setting prot", id="misspelled"),
        pytest.param("port = 99999\n", "port: input should be less than or equal to 65535", id="too large"),
        pytest.param("port = \n", "is not TOML", id="no TOML"),
        pytest.param(None, "can't be read: No such file", id="not there"),
    ],
)
def test_a_file_that_can_not_be_used_says_why(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "settings.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsInvalid, match=says):
        load_run("--config", str(file))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--max-concurrent-images", "10"],
            "max_client_batch_size (256) is above max_concurrent_images (10)",
        ),
        (["--max-image-pixels", "3000000000"], "max_image_pixels: input should be less than or equal to"),
    ],
)
def test_bounds_that_can_not_be_are_said_in_the_settings_own_names(flags: list[str], says: str) -> None:
    with pytest.raises(SettingsInvalid) as refused:
        load(Settings, flags, prog="test")
    assert says in str(refused.value)


def test_an_unknown_flag_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load_run("--prot", "1")
    assert "--prot" in capsys.readouterr().err


def test_help_says_what_each_setting_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        load_run("--help")
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    undescribed = [name for name, field in Settings.model_fields.items() if not field.description]
    assert undescribed == []


def test_the_engine_gets_its_part() -> None:
    settings = load_run("--max-image-pixels", "1000", "--max-client-batch-size", "7", "--cache-size", "0")
    config = settings.inference()
    assert (config.limits.max_pixels, config.max_images_per_request, config.cache_rows) == (1000, 7, 0)


def test_indexing_passes_over_what_is_the_services_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('port = 1\ndata_dir = "there"\n')
    settings = load(IndexAddSettings, ["photos", "--config", str(file)], prog="dino-serve index add")
    assert (settings.sources, settings.data_dir) == ([Path("photos")], Path("there"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("milvus:19530", "no address"),
        ("ftp://host", "no address"),
        ("http://", "no address"),
        ("http://root:secret@host:19530", "--search-token-file"),
    ],
)
def test_a_search_server_has_an_address_and_no_password_in_it(url: str, says: str) -> None:
    with pytest.raises(SettingsInvalid, match=says) as refused:
        load_run("--search-url", url)
    assert "secret" not in str(refused.value)


def test_the_token_of_the_search_server_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("root:secret\n")
    settings = load_run("--search-url", "https://milvus.example.org", "--search-token-file", str(file))
    assert settings.search_token() == "root:secret"
    assert "secret" not in repr(settings)
    assert load_run().search_token() is None
    file.write_text("")
    for name in (file, tmp_path / "nowhere"):
        with pytest.raises(SettingsInvalid, match="search token file"):
            load_run("--search-token-file", str(name)).search_token()


@pytest.mark.parametrize("space", ["", "a_b", "1a", "a" * 21])
def test_a_space_of_the_search_server_is_letters_and_digits(space: str) -> None:
    with pytest.raises(SettingsInvalid, match="search_space"):
        load_run("--search-space", space)


def test_several_models_are_named_by_flags_by_the_environment_or_by_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = (ModelSource(path=Path("models/a")), ModelSource(name="mine", path=Path("models/b")))
    assert load_run().model == (ModelSource(path=Path("models/default")),)
    assert load_run("--model", "models/a", "--model", "mine=models/b").model == two
    file = tmp_path / "settings.toml"
    file.write_text('model = ["models/a", "mine=models/b"]\n')
    assert load_run("--config", str(file)).model == two
    # The commands of one model take the first.
    add = load(IndexAddSettings, ["photos", "--config", str(file)], prog="dino-serve index add")
    assert add.model == Path("models/a")
    monkeypatch.setenv("DINO_SERVE_MODEL", "models/a,mine=models/b")
    assert load_run().model == two


@pytest.mark.parametrize("text", ["/somewhere/name=value", ".hidden=models/b"])
def test_a_path_may_have_an_equals_sign(text: str) -> None:
    assert load_run("--model", text).model == (ModelSource(path=Path(text)),)


def test_bundles_to_load_later_lie_beside_the_first_model_and_never_anywhere() -> None:
    assert load_run("--model", "/srv/models/a").models_root == Path("/srv/models")
    assert load_run("--models-dir", "/srv/bundles").models_root == Path("/srv/bundles")
    assert load_run("--model", "/bundle").models_root is None
