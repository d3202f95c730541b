"""The documentation page: Swagger UI from this service's own files, with the OpenAPI document beside it."""

from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.responses import HTMLResponse, RedirectResponse, Response

STATIC_FILES = Path(__file__).parent.parent / "ui" / "static"
# Swagger UI sets styles from its script and draws images from data URLs; scripts come from this service alone.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rankpress API</title>
<link rel="icon" type="image/png" href="static/swagger-ui/favicon-32x32.png">
<link rel="stylesheet" href="static/swagger-ui/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="static/swagger-ui/swagger-ui-bundle.js"></script>
<script src="static/docs.js"></script>
</body>
</html>
"""

router = APIRouter()


@router.get("/", include_in_schema=False)
async def root() -> Response:
    """Whoever opens the address that `serve` prints finds the page."""
    return RedirectResponse("docs")


@router.get("/docs", include_in_schema=False)
async def docs_page() -> Response:
    """The page."""
    return HTMLResponse(_PAGE, headers={"content-security-policy": _POLICY})


def mount_static_files(app: FastAPI) -> None:
    """Serve the page's script and style."""
    app.mount("/static", StaticFiles(directory=STATIC_FILES), name="static")
