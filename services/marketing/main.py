"""`python -m services.marketing.main`, or `eventbus run services.marketing.main:service`."""

from eventbus import run
from services.marketing.handlers import service

if __name__ == "__main__":
    run(service)
