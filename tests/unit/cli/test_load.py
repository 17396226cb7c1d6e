"""MODULE:NAME: what is found, and what is said about what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from eventbus import SetupError
from eventbus.cli import load
from eventbus.cli.output import WrongUsage

TWO = """
from eventbus import Catalogue, Event, Service

payments, mails = Service("payments"), Service("mails")
same = payments

class Paid(Event):
    order: str

FIRST, SECOND = Catalogue(Paid), Catalogue()
"""


@pytest.fixture(autouse=True)
def modules(hello: Path) -> Path:
    (hello / "two.py").write_text(TWO)
    (hello / "shop").mkdir()
    (hello / "shop" / "main.py").write_text("from two import payments as service\n")
    return hello


def names(*targets: str) -> list[str]:
    return [service.name for service in load.services(targets)]


def test_a_target_is_a_service() -> None:
    assert names("two:mails") == ["mails"]
    assert names("shop.main:service", "hello:greeter") == ["payments", "greeter"]


def test_a_module_alone_is_every_service_in_it_once() -> None:
    assert names("two") == ["payments", "mails"]
    assert names("two:same", "two", "shop.main") == ["payments", "mails"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nosuch", "there is no module 'nosuch', neither in {here} nor installed"),
        ("shop.nosuch:service", "there is no module 'shop.nosuch'"),
        ("hello.greeter", "did you mean 'hello:greeter'?"),
        ("hello:gretter", "hello has no 'gretter': did you mean 'hello:greeter'?"),
        ("two:billing", "two has no 'billing' (Services there: payments, mails, same)"),
        ("two:Paid", "two:Paid is a class, not a Service"),
        ("two:FIRST", "two:FIRST is of type Catalogue, not a Service"),
        ("hello.py", "'hello.py' is a file: give its module, 'hello'"),
        ("./shop/main.py:service", "give its module, 'shop.main:service'"),
        ("", "'' is no MODULE:NAME"),
        ("hello:", "'hello:' is no MODULE:NAME"),
        ("hello:a:b", "'hello:a:b' is no MODULE:NAME"),
        ("..hello", "'..hello' is no MODULE:NAME"),
        ("two words", "'two words' is no MODULE:NAME"),
    ],
)
def test_what_is_not_there_is_wrong_usage_with_a_remedy(target: str, said: str, hello: Path) -> None:
    with pytest.raises(WrongUsage) as error:
        load.services([target])

    assert said.format(here=hello) in str(error.value)


def test_a_module_without_services_says_so(hello: Path) -> None:
    (hello / "empty.py").touch()

    with pytest.raises(WrongUsage, match="empty has no Service at module level"):
        load.services(["empty"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nosuchthing\n", "ModuleNotFoundError: No module named 'nosuchthing' ({file}:1)"),
        ("\n1 / 0\n", "ZeroDivisionError: division by zero ({file}:2)"),
        ("def f(:\n", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("import sys; sys.exit('no settings')\n", "SystemExit: no settings ({file}:1)"),
    ],
)
def test_a_module_that_breaks_is_not_wrong_usage_and_the_place_is_named(text: str, said: str, hello: Path) -> None:
    file = hello / "broken.py"
    file.write_text(text)

    with pytest.raises(SetupError) as error:
        load.services(["broken"])

    assert str(error.value) == f"broken cannot be imported: {said.format(file=file)}"


def test_a_catalogue_is_named_or_the_only_one_or_made_of_the_events() -> None:
    assert load.catalogue("two:FIRST").types == ("paid.v1",)
    assert load.catalogue("two:SECOND").types == ()
    assert load.catalogue("schemas").find("order_placed.v1") is not None
    assert load.catalogue("hello").types == ("greeted.v1", "greeted.v2")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("two", "two has several catalogues: say which (two:FIRST, two:SECOND)"),
        ("two:THIRD", "two has no 'THIRD'"),
        ("two:Paid", "two:Paid is a class, not a Catalogue (Catalogues there: FIRST, SECOND)"),
        ("shop.main", "shop.main has neither a Catalogue nor an Event"),
    ],
)
def test_a_catalogue_that_is_not_there_is_wrong_usage(target: str, said: str) -> None:
    with pytest.raises(WrongUsage) as error:
        load.catalogue(target)

    assert said in str(error.value)
