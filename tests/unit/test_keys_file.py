"""The key that a service makes for itself."""

import threading
from pathlib import Path

import pytest

from service.keys_file import ensure_api_key
from service.settings import Settings


def test_configured_key_stands_and_no_file_is_made(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, api_key="sixteen-letters!")
    assert ensure_api_key(settings) == ("sixteen-letters!", None)
    assert list(tmp_path.iterdir()) == []


def test_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "new")
    key, path = ensure_api_key(settings)
    assert path == settings.key_file
    assert len(key) > 40
    assert path.stat().st_mode & 0o777 == 0o600
    assert ensure_api_key(settings) == (key, path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_two_services_at_once_agree(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    keys: list[str] = []
    threads = [threading.Thread(target=lambda: keys.append(ensure_api_key(settings)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1


def test_damaged_file_is_told(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    settings.key_file.write_text("short")
    with pytest.raises(ValueError, match="delete the file"):
        ensure_api_key(settings)
