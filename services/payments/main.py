"""`python -m services.payments.main`, or `eventbus run services.payments.main:service`."""

from eventbus import run
from services.payments.handlers import service

if __name__ == "__main__":
    run(service)
