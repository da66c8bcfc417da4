"""The Hub's client, and what it may answer, in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_moe.errors import HfMoeError, UsageError

AGAIN = "run it again: what has arrived is not sent twice"

# Status -> what it means, and what would work.
STATUSES: dict[int, str] = {
    401: "the Hub does not take this token; log in again with `hf auth login`",
    403: "this token has no right to write there",
    409: f"somebody else has changed the repository meanwhile; look at it, then {AGAIN}",
    412: f"somebody else has changed the repository meanwhile; look at it, then {AGAIN}",
    413: "the Hub has no room for this",
    507: "the Hub has no room for this",
}


class HubError(HfMoeError):
    """The Hub refuses, or is out of reach. What the message says of it is all that is known."""


def check_repo_id(repo_id: str) -> None:
    """Raises UsageError where it can be no repository's: a path, or a name the Hub would refuse."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        wanted = "give OWNER/NAME or NAME, of letters, digits, '-', '_' and '.'"
        raise UsageError(f"{repo_id!r}: is no id of a repository; {wanted}.") from error


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Whatever the client raises inside becomes one HubError that never shows a token."""
    try:
        yield
    except HfMoeError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError("nobody is logged in to the Hub; do it with `hf auth login`.") from error
    except OfflineModeIsEnabled as error:
        raise HubError("the Hub is switched off by HF_HUB_OFFLINE=1; unset it.") from error
    except Exception as error:  # the client wraps the same cause in many things
        raise HubError(f"{repo_id}: {_without_token(_reason(error))}.") from error


def _reason(error: BaseException) -> str:
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, RevisionNotFoundError):
            return "has no such branch, tag or commit"
        if isinstance(cause, RepositoryNotFoundError):
            return "there is no such repository, or this token may not see it"
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            return STATUSES.get(status, f"the Hub answers {status}; {AGAIN}")
        if type(cause).__module__.startswith("httpx") or isinstance(cause, ConnectionError):
            return f"the connection was lost; {AGAIN}"
    return (str(chain[0]) or type(chain[0]).__name__).strip().splitlines()[0].rstrip(".")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "…") if token else text


def api_at(endpoint: str | None) -> HfApi:
    return HfApi(endpoint=endpoint, library_name="hf_moe")
