import pytest
from house import build, make_template


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def make_house(template, tmp_path):
    houses = []

    def make(**changes):
        houses.append(build(template, tmp_path / f"data-{len(houses)}", **changes))
        return houses[-1]

    yield make
    for house in houses:
        house.supervisor.drain(0.5)
        house.close()


@pytest.fixture
def house(make_house):
    return make_house()
