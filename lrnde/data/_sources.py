"""Where the files of the data sets come from, and how they are known."""

from collections.abc import Sequence
from typing import NamedTuple


class File(NamedTuple):
    """A file and what is known about its contents.

    - `name`: Its name, in a folder and after a mirror's address.
    - `size`: Its size in bytes, where it is known.
    - `sha256`: Its SHA-256.
    - `also`: SHA-256s of other files of that name that will do.
    """

    name: str
    size: int | None
    sha256: str
    also: tuple[str, ...] = ()


class Source(NamedTuple):
    files: Sequence[File]
    urls: Sequence[str]  # mirrors: each file is at url + name
    members: Sequence[File] = ()  # of the one archive, where they are known


SOURCES = {
    "cifar10": Source(
        files=(
            File(
                "cifar-10-binary.tar.gz",
                170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        urls=("https://www.cs.toronto.edu/~kriz/",),
        members=(
            File(
                "data_batch_1.bin",
                30730000,
                "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            ),
            File(
                "data_batch_2.bin",
                30730000,
                "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            ),
            File(
                "data_batch_3.bin",
                30730000,
                "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            ),
            File(
                "data_batch_4.bin",
                30730000,
                "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            ),
            File(
                "data_batch_5.bin",
                30730000,
                "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            ),
            File(
                "test_batch.bin",
                30730000,
                "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
            ),
        ),
    ),
    "mnist": Source(
        files=(
            File(
                "train-images-idx3-ubyte.gz",
                9912422,
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            File(
                "train-labels-idx1-ubyte.gz",
                28881,
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            File(
                "t10k-images-idx3-ubyte.gz",
                1648877,
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            File(
                "t10k-labels-idx1-ubyte.gz",
                4542,
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
        urls=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://raw.githubusercontent.com/fgnt/mnist/master/",
        ),
    ),
    # The copies in circulation are other archives of the same records.
    "physionet2012": Source(
        files=(
            File(
                "set-a.tar.gz",
                None,
                "8cb250f179cd0952b4b9ebcf8954b63d70383131670fac1cfee13deaa13ca920",
                ("95358b88516ed6186ea6877517e84105276a5010fd9c8e9a4f25be610d3517bf",),
            ),
            File(
                "set-b.tar.gz",
                None,
                "b1637a2a423a8e76f8f087896cfc5fdf28f88519e1f4e874fbda69b2a64dac30",
                ("5cc26395194cd75aa1a1178de34638276f3a0598e01996c7dcc6ee13e762a09c",),
            ),
            File(
                "set-c.tar.gz",
                None,
                "a4a56b95bcee4d50a3874fe298bf2998f2ed0dd98a676579573dc10419329ee1",
                ("5ebb6639201bac97c13ed4ad8e5870827182eff97286843c72722d4f7545a24c",),
            ),
        ),
        urls=("https://physionet.org/files/challenge-2012/1.0.0/",),
    ),
}
