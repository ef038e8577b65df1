"""A text on nothing in particular, for recipes that bring none to measure an SAE's fit on."""

NEUTRAL_TEXT = """\
The town lies where two rivers meet, on a low hill that stays dry when the meadows are under \
water. Its oldest street leads from the bridge to the market square, past a bakery, a pharmacy \
and a small school with a red roof. On Saturdays farmers bring apples, cheese, honey and eggs, \
and people who have known each other for years stop to talk about the weather, the harvest and \
their children.

Anna works in the library. In the morning she sorts the books that were returned, and in the \
afternoon she helps students who are looking for something about history, chemistry or music. \
"Do you have a map of the railway from 1890?" a visitor asked last week. She did not know, but \
after an hour she found one in a drawer, folded between two newspapers. The line had been \
planned to cross the valley in the north; it was never built, because the money ran out.

How does a plant make sugar? Light falls on a leaf, and the green pigment in its cells takes up \
part of it. With that energy the cell splits water, gives off oxygen, and uses the hydrogen \
together with carbon dioxide from the air. The sugar feeds the roots, the stem and the fruit. At \
night the process stops, and the plant breathes as animals do.

To cook rice for four people, take two cups of rice and three and a half cups of water. Wash the \
rice until the water runs clear, bring it to the boil, add a little salt, cover the pot and turn \
the heat down. After fifteen minutes take it off the stove and let it stand for another ten. Do \
not stir it while it cooks.

In 2019 the company sold 48,000 bicycles, 12% more than in the year before. Costs rose as well: \
steel became more expensive, and the new factory needed workers who had to be trained first. The \
board expects that sales will grow by another five to seven per cent, provided that interest \
rates do not rise again. Investors were less certain, and the share price fell slightly on \
Thursday.

def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)

The judge listened to both sides before she spoke. The contract, she said, was short but clear: \
whoever rents the boat must bring it back before dark, and must pay for what is broken. Nobody \
had said anything about the storm. "I understand that you were afraid," she told the young man, \
"but you could have called." He nodded, looked at the floor and agreed to pay half.

When the moon passes between the sun and the earth, its shadow travels across the land at more \
than two thousand kilometres an hour. Birds grow silent, the air becomes cooler, and for a few \
minutes the brightest stars can be seen. Then a thin edge of light appears, and the day begins a \
second time.
"""
