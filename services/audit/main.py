"""`python -m services.audit.main`, or `eventbus run services.audit.main:service`."""

from eventbus import run
from services.audit.handlers import service

if __name__ == "__main__":
    run(service)
