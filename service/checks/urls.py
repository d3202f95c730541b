"""URLs as they may be shown."""


def shown_url(url: str) -> str:
    """A URL without its password."""
    scheme, separator, rest = url.partition("://")
    userinfo, at, place = rest.rpartition("@")
    user = userinfo.partition(":")[0]
    return f"{scheme}{separator}{user}{':***' if ':' in userinfo else ''}{at}{place}"
