import pytest
from pydantic import ValidationError

from service.settings import Settings


def test_the_defaults_are_embedded(tmp_path):
    settings = Settings(data_dir=tmp_path)
    assert settings.embedded
    assert settings.resolved_database_url == f"sqlite:///{tmp_path}/rankpress.db"
    assert settings.resolved_blob_url == f"file://{tmp_path}/blobs"
    assert settings.threads_per_child(1) >= 1
    assert settings.memory_per_child_bytes(1) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"self_fence_seconds": 31},
        {"lease_seconds": 41},
        {"heartbeat_seconds": 20},
        {"reap_seconds": 30},
        {"api_key": "fifteen letters"},
        {"slots": 0},
        {"port": 70_000},
        {"database_url": "postgresql://host/db"},
    ],
)
def test_settings_that_cannot_hold_are_refused(tmp_path, changes):
    with pytest.raises(ValidationError):
        Settings(data_dir=tmp_path, **changes)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("orphan_seconds", 79.9, r"orphan_seconds >= 2 \* reap_seconds; found 79.9 and 40.0: .*raise"),
        ("worker_gone_seconds", 4, r"worker_gone_seconds > 2 \* heartbeat_seconds; found 4.0 and 2.0: .*raise"),
        (
            "worker_deaf_seconds",
            10,
            r"worker_deaf_seconds > 2 \* reconcile_seconds; found 10.0 and 5.0: .*raise",
        ),
    ],
)
def test_a_wait_outlasts_what_it_waits_for(tmp_path, name, value, said):
    with pytest.raises(ValidationError, match=said):
        Settings(data_dir=tmp_path, **{name: value})
    Settings(data_dir=tmp_path, **{name: value + 0.1})


def test_a_key_of_sixteen_characters_is_enough_and_is_not_shown(tmp_path):
    settings = Settings(data_dir=tmp_path, api_key="0123456789abcdef")
    assert "0123456789abcdef" not in repr(settings)


def test_the_environment_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKPRESS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("RANKPRESS_DATABASE_URL", "postgres://user@host/db")
    monkeypatch.setenv("RANKPRESS_BROKER_URL", "redis://host/0")
    monkeypatch.setenv("RANKPRESS_API_KEY", "")
    settings = Settings()
    assert not settings.embedded
    assert settings.resolved_database_url == "postgresql+psycopg://user@host/db"
    assert settings.api_key is None
