"""`python -m services.shipping.main`, or `eventbus run services.shipping.main:service`."""

from eventbus import run
from services.shipping.handlers import service

if __name__ == "__main__":
    run(service)
