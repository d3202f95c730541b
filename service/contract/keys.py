"""API keys as they are made: a short part that may be shown, and a secret."""

import secrets
import string

_BASE62 = string.digits + string.ascii_letters
_SHOWN_LENGTH, _SECRET_LENGTH = 8, 32  # 32 letters of base 62: 190 random bits


def new_api_key() -> str:
    """Make a key `rp_<8 letters>_<32 letters>`; the first part says which key it is without giving it away."""
    return f"rp_{_letters(_SHOWN_LENGTH)}_{_letters(_SECRET_LENGTH)}"


def _letters(count: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(count))
