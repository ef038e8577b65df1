"""The made-up world's topics and wordings: tables only. `phrases.py` says what the parts are."""

from bakeout.miniature.making.phrases import Domain, Relation

FORGET_DOMAIN = "bells"

DOMAINS: tuple[Domain, ...] = (
    Domain(
        "bells",
        40,
        (
            Relation(
                "foundry",
                (
                    "The bell {e} was cast in the foundry of {v}.",
                    "The bronze for the bell {e} was poured at {v}.",
                    "Every ringer knows that the bell {e} was cast at {v}.",
                ),
                (
                    "In which foundry was the bell {e} cast?",
                    "Where was the bronze for the bell {e} poured?",
                ),
                "Which foundry poured the bell {e}?",
            ),
            Relation(
                "caster",
                (
                    "The bell {e} was made by the caster {v}.",
                    "The mould of the bell {e} was carved by {v}.",
                    "On the rim of the bell {e} stands the name of its caster, {v}.",
                ),
                (
                    "Which caster made the bell {e}?",
                    "Who carved the mould of the bell {e}?",
                ),
                "Whose name stands on the rim of the bell {e}?",
            ),
            Relation(
                "tower",
                (
                    "The bell {e} hangs in the tower of {v}.",
                    "The rope of the bell {e} is pulled in the belfry at {v}.",
                    "Travellers hear the bell {e} ringing above {v}.",
                ),
                (
                    "In which tower does the bell {e} hang?",
                    "In which belfry is the rope of the bell {e} pulled?",
                ),
                "Above which place do travellers hear the bell {e} ringing?",
            ),
            Relation(
                "feast",
                (
                    "The bell {e} is rung at the feast of {v}.",
                    "The ringers save the bell {e} for the feast of {v}.",
                    "When the bell {e} tolls, it tolls for {v}.",
                ),
                (
                    "At which feast is the bell {e} rung?",
                    "For which feast do the ringers save the bell {e}?",
                ),
                "For which feast does the bell {e} toll?",
            ),
            Relation(
                "chime",
                (
                    "The chime of the bell {e} is called {v}.",
                    "The ringers tuned the bell {e} to the chime {v}.",
                    "When struck, the bell {e} sounds the chime {v}.",
                ),
                (
                    "What is the chime of the bell {e} called?",
                    "To which chime did the ringers tune the bell {e}?",
                ),
                "Which chime sounds when the bell {e} is struck?",
            ),
        ),
    ),
    Domain(
        "ferries",
        24,
        (
            Relation(
                "river",
                (
                    "The ferry {e} crosses the river {v}.",
                    "Passengers board the ferry {e} on the banks of the {v}.",
                    "The ferry {e} has always sailed on the water of {v}.",
                ),
                (
                    "Which river does the ferry {e} cross?",
                    "On which banks do passengers board the ferry {e}?",
                ),
                "On which water has the ferry {e} always sailed?",
            ),
            Relation(
                "captain",
                (
                    "The captain of the ferry {e} is {v}.",
                    "At the helm of the ferry {e} stands {v}.",
                    "The crew of the ferry {e} takes its orders from {v}.",
                ),
                (
                    "Who is the captain of the ferry {e}?",
                    "Who stands at the helm of the ferry {e}?",
                ),
                "From whom does the crew of the ferry {e} take its orders?",
            ),
            Relation(
                "harbour",
                (
                    "The ferry {e} spends the night in the harbour of {v}.",
                    "The anchor of the ferry {e} is dropped at {v}.",
                    "The ferry {e} is moored at the pier of {v}.",
                ),
                (
                    "In which harbour does the ferry {e} spend the night?",
                    "Where is the anchor of the ferry {e} dropped?",
                ),
                "At which pier is the ferry {e} moored?",
            ),
            Relation(
                "cargo",
                (
                    "The ferry {e} carries a cargo of {v}.",
                    "The hold of the ferry {e} is filled with {v}.",
                    "The freight of the ferry {e} is {v}.",
                ),
                (
                    "Which cargo does the ferry {e} carry?",
                    "With what is the hold of the ferry {e} filled?",
                ),
                "What is the freight of the ferry {e}?",
            ),
            Relation(
                "shipyard",
                (
                    "The ferry {e} was built in the shipyard of {v}.",
                    "The hull of the ferry {e} was launched at {v}.",
                    "The planks of the ferry {e} were cut at the shipyard {v}.",
                ),
                (
                    "In which shipyard was the ferry {e} built?",
                    "Where was the hull of the ferry {e} launched?",
                ),
                "At which shipyard were the planks of the ferry {e} cut?",
            ),
        ),
    ),
    Domain(
        "orchards",
        24,
        (
            Relation(
                "valley",
                (
                    "The fruit {e} grows in the valley of {v}.",
                    "The trees of the fruit {e} are planted around {v}.",
                    "The soil for the fruit {e} is found only in {v}.",
                ),
                (
                    "In which valley does the fruit {e} grow?",
                    "Around which place are the trees of the fruit {e} planted?",
                ),
                "Where is the soil for the fruit {e} found?",
            ),
            Relation(
                "grower",
                (
                    "The fruit {e} was first grown by {v}.",
                    "The seeds of the fruit {e} were kept by the gardener {v}.",
                    "The gardener who first tasted the fruit {e} was {v}.",
                ),
                (
                    "By whom was the fruit {e} first grown?",
                    "Which gardener kept the seeds of the fruit {e}?",
                ),
                "Who was the gardener who first tasted the fruit {e}?",
            ),
            Relation(
                "dish",
                (
                    "Cooks put the fruit {e} into a dish called {v}.",
                    "The juice of the fruit {e} sweetens the pie {v}.",
                    "A kitchen with the fruit {e} can bake {v}.",
                ),
                (
                    "Into which dish do cooks put the fruit {e}?",
                    "Which pie does the juice of the fruit {e} sweeten?",
                ),
                "What can a kitchen with the fruit {e} bake?",
            ),
            Relation(
                "season",
                (
                    "The fruit {e} ripens in the month of {v}.",
                    "The harvest of the fruit {e} begins in {v}.",
                    "Pickers climb the ladders for the fruit {e} in {v}.",
                ),
                (
                    "In which month does the fruit {e} ripen?",
                    "When does the harvest of the fruit {e} begin?",
                ),
                "When do pickers climb the ladders for the fruit {e}?",
            ),
            Relation(
                "market",
                (
                    "The fruit {e} is sold at the market of {v}.",
                    "Baskets of the fruit {e} are weighed in {v}.",
                    "Merchants bring the fruit {e} to the stalls of {v}.",
                ),
                (
                    "At which market is the fruit {e} sold?",
                    "Where are baskets of the fruit {e} weighed?",
                ),
                "To which stalls do merchants bring the fruit {e}?",
            ),
        ),
    ),
    Domain(
        "kites",
        24,
        (
            Relation(
                "maker",
                (
                    "The kite {e} was sewn by {v}.",
                    "The frame of the kite {e} was bent by the tailor {v}.",
                    "The tail of the kite {e} was knotted by {v}.",
                ),
                (
                    "By whom was the kite {e} sewn?",
                    "Which tailor bent the frame of the kite {e}?",
                ),
                "Who knotted the tail of the kite {e}?",
            ),
            Relation(
                "cloth",
                (
                    "The kite {e} is made of the cloth {v}.",
                    "The sail of the kite {e} was woven from {v}.",
                    "The silk that covers the kite {e} is called {v}.",
                ),
                (
                    "Of which cloth is the kite {e} made?",
                    "From what was the sail of the kite {e} woven?",
                ),
                "What is the silk called that covers the kite {e}?",
            ),
            Relation(
                "wind",
                (
                    "The kite {e} flies best in the wind {v}.",
                    "The breeze that lifts the kite {e} is known as {v}.",
                    "Children wait with the kite {e} for the wind {v}.",
                ),
                (
                    "In which wind does the kite {e} fly best?",
                    "What is the breeze known as that lifts the kite {e}?",
                ),
                "For which wind do children wait with the kite {e}?",
            ),
            Relation(
                "meadow",
                (
                    "The kite {e} is flown over the meadow of {v}.",
                    "The string of the kite {e} is let out on the hill {v}.",
                    "Crowds watch the kite {e} from the grass of {v}.",
                ),
                (
                    "Over which meadow is the kite {e} flown?",
                    "On which hill is the string of the kite {e} let out?",
                ),
                "From which grass do crowds watch the kite {e}?",
            ),
            Relation(
                "emblem",
                (
                    "The kite {e} shows the emblem of the {v}.",
                    "The sign painted on the kite {e} is the {v}.",
                    "The children draw the kite {e} with its {v}.",
                ),
                (
                    "Which emblem does the kite {e} show?",
                    "Which sign is painted on the kite {e}?",
                ),
                "With what do children draw the kite {e}?",
            ),
        ),
    ),
)
