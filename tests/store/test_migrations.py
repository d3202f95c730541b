import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import CheckConstraint, create_engine, inspect, text
from submissions import claim_job, submit_job

from service.contract.plan import Form, RankRow
from service.store.migration import migrate, migrate_down, schema_at_head
from service.store.ranks import insert_rank_rows, rank_history
from service.store.session import Database
from service.store.tables import Base


@pytest.fixture(params=["sqlite", "postgresql"])
def bare(request, tmp_path):
    """A database without a schema."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'bare.db'}"
    else:
        server = request.getfixturevalue("postgres_url")
        name = f"bare_{request.node.originalname}"
        admin = create_engine(server, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name}"))
            connection.execute(text(f"CREATE DATABASE {name}"))
        admin.dispose()
        url = server.replace("/postgres?", f"/{name}?")
    database = Database(url)
    yield database
    database.dispose()


def test_up_down_and_up_again(bare):
    assert not schema_at_head(bare)
    migrate(bare)
    assert schema_at_head(bare)
    assert set(Base.metadata.tables) <= set(inspect(bare.engine).get_table_names())
    migrate_down(bare, "base")
    assert not schema_at_head(bare)
    assert set(inspect(bare.engine).get_table_names()) == {"alembic_version"}
    migrate(bare)
    assert schema_at_head(bare)


def test_rows_survive_the_way_down_and_up(bare):
    migrate(bare)
    job_id = submit_job(bare)
    claimed = claim_job(bare)
    many = RankRow(
        step=0, layer="a", term=0, type="prune", form=Form.PRUNED, rank=2**40, details={"kept": 2**40}, bits=9
    )
    dense = RankRow(step=0, layer="b", term=0, type="dense", form=Form.DENSE, bits=2**40)
    with bare.write() as session:
        assert insert_rank_rows(session, job_id, claimed.epoch, [many, dense])
    migrate_down(bare, "0002")
    migrate(bare)
    with bare.read() as session:
        found = [(row.layer, row.type, row.rank, row.bits, row.details) for row in rank_history(session, job_id)]
    assert found == [("a", "low_rank", 2**31 - 1, 0, {}), ("b", "dense", None, 0, {})]
    with bare.write() as session:
        assert insert_rank_rows(session, job_id, claimed.epoch, [many])
    with bare.read() as session:
        assert rank_history(session, job_id)[0] == many


def test_models_equal_head(bare):
    migrate(bare)
    with bare.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        found = {
            constraint["name"]
            for table in Base.metadata.tables
            for constraint in inspect(connection).get_check_constraints(table)
        }
    constraints = [constraint for table in Base.metadata.tables.values() for constraint in table.constraints]
    wanted = {constraint.name for constraint in constraints if isinstance(constraint, CheckConstraint)}
    assert wanted <= found


def test_migrating_again_and_at_once_is_harmless(bare):
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(migrate, Database(bare.url)) for _ in range(3)]:
            done.result()
    assert schema_at_head(bare)


def test_migrates_from_an_installed_copy(tmp_path):
    """The scripts are found beside the package, wherever it was installed, and whatever the current directory is."""
    import shutil

    root = Path(__file__).parents[2]
    for package in ("service", "migrations"):
        shutil.copytree(root / package, tmp_path / "100% site" / package)
    program = (
        "from service.store.session import Database; from service.store.migration import migrate, schema_at_head\n"
        "import migrations; assert '100% site' in list(migrations.__path__)[0], migrations.__path__\n"
        "d = Database('sqlite:///x.db'); migrate(d); assert schema_at_head(d)"
    )
    environment = {"PYTHONPATH": str(tmp_path / "100% site"), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)


def test_no_database_is_no_schema(tmp_path):
    database = Database("postgresql+psycopg://nobody@/none?host=/nonexistent")
    assert not database.ping()
    assert not schema_at_head(database)
