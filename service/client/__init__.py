"""The typed Python client of the service."""

from service.client.api import Client
from service.client.errors import ClientError, DownloadDamagedError, ServiceProblem, ServiceUnavailable, WaitTimeout

__all__ = ["Client", "ClientError", "DownloadDamagedError", "ServiceProblem", "ServiceUnavailable", "WaitTimeout"]
