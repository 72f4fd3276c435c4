"""The algebra of factors."""

from meshwright.sharding.program.factors import Factors


def test_a_merged_dimension_is_its_parts_major_first():
    factors = Factors()
    batch, sequence, merged = factors.new(8), factors.new(6), factors.new(48)
    assert factors.unite(merged, batch + sequence)
    assert factors.expand(merged) == factors.expand(batch) + factors.expand(sequence)


def test_splitting_one_member_splits_all():
    factors = Factors()
    left, right = factors.new(12), factors.new(12)
    factors.unite(left, right)
    pieces = factors.cut(left, [3, 4])
    assert pieces is not None
    assert factors.expand(right) == factors.expand(pieces[0]) + factors.expand(pieces[1])
    assert [factors.size(f) for f in factors.expand(right)] == [3, 4]


def test_two_splits_of_one_dimension_find_their_common_factors():
    factors = Factors()
    whole = factors.new(24)
    factors.cut(whole, [4, 6])
    factors.cut(whole, [2, 12])
    assert [factors.size(f) for f in factors.expand(whole)] == [2, 2, 6]


def test_what_cannot_be_laid_over_each_other_is_refused():
    factors = Factors()
    left, right = factors.new(12), factors.new(12)
    factors.cut(left, [3, 4])
    factors.cut(right, [4, 3])
    assert not factors.unite(left, right)
    assert factors.cut(factors.new(10), [4, 3]) is None


def test_size_one_has_no_factor():
    factors = Factors()
    assert factors.new(1) == ()
    assert factors.cut(factors.new(6), [1, 6, 1]) == [(), factors.expand((0,)), ()]
