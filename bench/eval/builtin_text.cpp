// Copyright 2026 The KVLean Authors
// SPDX-License-Identifier: Apache-2.0
#include "bench/eval/texts.hpp"

// Isaac Newton, Opticks, 4th edition, London 1730, the beginning of Query 31: in the public domain.
// The same words as the beginning of opticks-query-31.txt of get_texts.sh.

namespace kvlean::eval {

const Texts& builtin_texts() {
  // clang-format off
  static const Texts texts = {{
      "opticks-excerpt", "public domain", "built in", "1",
      "bf13681a5b2553d96aebcc80fc6eb918e58b69099e91be386a2d43d4a0dc2e4f",
      R"text(_Quest._ 31. Have not the small Particles of Bodies certain Powers,
Virtues, or Forces, by which they act at a distance, not only upon the
Rays of Light for reflecting, refracting, and inflecting them, but also
upon one another for producing a great Part of the Phaenomena of Nature?
For it's well known, that Bodies act one upon another by the Attractions
of Gravity, Magnetism, and Electricity; and these Instances shew the
Tenor and Course of Nature, and make it not improbable but that there
may be more attractive Powers than these. For Nature is very consonant
and conformable to her self. How these Attractions may be perform'd, I
do not here consider. What I call Attraction may be perform'd by
impulse, or by some other means unknown to me. I use that Word here to
signify only in general any Force by which Bodies tend towards one
another, whatsoever be the Cause. For we must learn from the Phaenomena
of Nature what Bodies attract one another, and what are the Laws and
Properties of the Attraction, before we enquire the Cause by which the
Attraction is perform'd. The Attractions of Gravity, Magnetism, and
Electricity, reach to very sensible distances, and so have been observed
by vulgar Eyes, and there may be others which reach to so small
distances as hitherto escape Observation; and perhaps electrical
Attraction may reach to such small distances, even without being excited
by Friction.

For when Salt of Tartar runs _per Deliquium_, is not this done by an
Attraction between the Particles of the Salt of Tartar, and the
Particles of the Water which float in the Air in the form of Vapours?
And why does not common Salt, or Salt-petre, or Vitriol, run _per
Deliquium_, but for want of such an Attraction? Or why does not Salt of
Tartar draw more Water out of the Air than in a certain Proportion to
its quantity, but for want of an attractive Force after it is satiated
with Water? And whence is it but from this attractive Power that Water
which alone distils with a gentle luke-warm Heat, will not distil from
Salt of Tartar without a great Heat? And is it not from the like
attractive Power between the Particles of Oil of Vitriol and the
Particles of Water, that Oil of Vitriol draws to it a good quantity of
Water out of the Air, and after it is satiated draws no more, and in
Distillation lets go the Water very difficultly? And when Water and Oil
of Vitriol poured successively into the same Vessel grow very hot in the
mixing, does not this Heat argue a great Motion in the Parts of the
Liquors? And does not this Motion argue, that the Parts of the two
Liquors in mixing coalesce with Violence, and by consequence rush
towards one another with an accelerated Motion? And when _Aqua fortis_,
or Spirit of Vitriol poured upon Filings of Iron dissolves the Filings
with a great Heat and Ebullition, is not this Heat and Ebullition
effected by a violent Motion of the Parts, and does not that Motion
argue that the acid Parts of the Liquor rush towards the Parts of the
Metal with violence, and run forcibly into its Pores till they get
between its outmost Particles, and the main Mass of the Metal, and
surrounding those Particles loosen them from the main Mass, and set them
at liberty to float off into the Water? And when the acid Particles,
which alone would distil with an easy Heat, will not separate from the
Particles of the Metal without a very violent Heat, does not this
confirm the Attraction between them?

When Spirit of Vitriol poured upon common Salt or Salt-petre makes an
Ebullition with the Salt, and unites with it, and in Distillation the
Spirit of the common Salt or Salt-petre comes over much easier than it
would do before, and the acid part of the Spirit of Vitriol stays
behind; does not this argue that the fix'd Alcaly of the Salt attracts
the acid Spirit of the Vitriol more strongly than its own Spirit, and
not being able to hold them both, lets go its own? And when Oil of
Vitriol is drawn off from its weight of Nitre, and from both the
Ingredients a compound Spirit of Nitre is distilled, and two parts of
this Spirit are poured on one part of Oil of Cloves or Carraway Seeds,
or of any ponderous Oil of vegetable or animal Substances, or Oil of
Turpentine thicken'd with a little Balsam of Sulphur, and the Liquors
grow so very hot in mixing, as presently to send up a burning Flame;
does not this very great and sudden Heat argue that the two Liquors mix
with violence, and that their Parts in mixing run towards one another
with an accelerated Motion, and clash with the greatest Force? And is it
not for the same reason that well rectified Spirit of Wine poured on the
same compound Spirit flashes; and that the _Pulvis fulminans_, composed
of Sulphur, Nitre, and Salt of Tartar, goes off with a more sudden and
violent Explosion than Gun-powder, the acid Spirits of the Sulphur and
Nitre rushing towards one another, and towards the Salt of Tartar, with
so great a violence, as by the shock to turn the whole at once into
Vapour and Flame? Where the Dissolution is slow, it makes a slow
Ebullition and a gentle Heat; and where it is quicker, it makes a
greater Ebullition with more heat; and where it is done at once, the
Ebullition is contracted into a sudden Blast or violent Explosion, with
a heat equal to that of Fire and Flame. So when a Drachm of the
above-mention'd compound Spirit of Nitre was poured upon half a Drachm
of Oil of Carraway Seeds _in vacuo_, the Mixture immediately made a
flash like Gun-powder, and burst the exhausted Receiver, which was a
Glass six Inches wide, and eight Inches deep. And even the gross Body of
Sulphur powder'd, and with an equal weight of Iron Filings and a little
Water made into Paste, acts upon the Iron, and in five or six hours
grows too hot to be touch'd, and emits a Flame. And by these Experiments
compared with the great quantity of Sulphur with which the Earth
abounds, and the warmth of the interior Parts of the Earth, and hot
Springs, and burning Mountains, and with Damps, mineral Coruscations,
Earthquakes, hot suffocating Exhalations, Hurricanes, and Spouts; we may
learn that sulphureous Steams abound in the Bowels of the Earth and
ferment with Minerals, and sometimes take fire with a sudden Coruscation
and Explosion; and if pent up in subterraneous Caverns, burst the
Caverns with a great shaking of the Earth, as in springing of a Mine.
And then the Vapour generated by the Explosion, expiring through the
Pores of the Earth, feels hot and suffocates, and makes Tempests and
Hurricanes, and sometimes causes the Land to slide, or the Sea to boil,
and carries up the Water thereof in Drops, which by their weight fall
down again in Spouts. Also some sulphureous Steams, at all times when
the Earth is dry, ascending into the Air, ferment there with nitrous
Acids, and sometimes taking fire cause Lightning and Thunder, and fiery
Meteors. For the Air abounds with acid Vapours fit to promote
Fermentations, as appears by the rusting of Iron and Copper in it, the
kindling of Fire by blowing, and the beating of the Heart by means of
Respiration. Now the above-mention'd Motions are so great and violent as
to shew that in Fermentations the Particles of Bodies which almost rest,
are put into new Motions by a very potent Principle, which acts upon
them only when they approach one another, and causes them to meet and
clash with great violence, and grow hot with the motion, and dash one
another into pieces, and vanish into Air, and Vapour, and Flame.

)text"
      R"text(When Salt of Tartar _per deliquium_, being poured into the Solution of
any Metal, precipitates the Metal and makes it fall down to the bottom
of the Liquor in the form of Mud: Does not this argue that the acid
Particles are attracted more strongly by the Salt of Tartar than by the
Metal, and by the stronger Attraction go from the Metal to the Salt of
Tartar? And so when a Solution of Iron in _Aqua fortis_ dissolves the
_Lapis Calaminaris_, and lets go the Iron, or a Solution of Copper
dissolves Iron immersed in it and lets go the Copper, or a Solution of
Silver dissolves Copper and lets go the Silver, or a Solution of Mercury
in _Aqua fortis_ being poured upon Iron, Copper, Tin, or Lead, dissolves
the Metal and lets go the Mercury; does not this argue that the acid
Particles of the _Aqua fortis_ are attracted more strongly by the _Lapis
Calaminaris_ than by Iron, and more strongly by Iron than by Copper, and
more strongly by Copper than by Silver, and more strongly by Iron,
Copper, Tin, and Lead, than by Mercury? And is it not for the same
reason that Iron requires more _Aqua fortis_ to dissolve it than Copper,
and Copper more than the other Metals; and that of all Metals, Iron is
dissolved most easily, and is most apt to rust; and next after Iron,
Copper?

When Oil of Vitriol is mix'd with a little Water, or is run _per
deliquium_, and in Distillation the Water ascends difficultly, and
brings over with it some part of the Oil of Vitriol in the form of
Spirit of Vitriol, and this Spirit being poured upon Iron, Copper, or
Salt of Tartar, unites with the Body and lets go the Water; doth not
this shew that the acid Spirit is attracted by the Water, and more
attracted by the fix'd Body than by the Water, and therefore lets go the
Water to close with the fix'd Body? And is it not for the same reason
that the Water and acid Spirits which are mix'd together in Vinegar,
_Aqua fortis_, and Spirit of Salt, cohere and rise together in
Distillation; but if the _Menstruum_ be poured on Salt of Tartar, or on
Lead, or Iron, or any fix'd Body which it can dissolve, the Acid by a
stronger Attraction adheres to the Body, and lets go the Water? And is
it not also from a mutual Attraction that the Spirits of Soot and
Sea-Salt unite and compose the Particles of Sal-armoniac, which are less
volatile than before, because grosser and freer from Water; and that the
Particles of Sal-armoniac in Sublimation carry up the Particles of
Antimony, which will not sublime alone; and that the Particles of
Mercury uniting with the acid Particles of Spirit of Salt compose
Mercury sublimate, and with the Particles of Sulphur, compose Cinnaber;
and that the Particles of Spirit of Wine and Spirit of Urine well
rectified unite, and letting go the Water which dissolved them, compose
a consistent Body; and that in subliming Cinnaber from Salt of Tartar,
or from quick Lime, the Sulphur by a stronger Attraction of the Salt or
Lime lets go the Mercury, and stays with the fix'd Body; and that when
Mercury sublimate is sublimed from Antimony, or from Regulus of
Antimony, the Spirit of Salt lets go the Mercury, and unites with the
antimonial metal which attracts it more strongly, and stays with it till
the Heat be great enough to make them both ascend together, and then
carries up the Metal with it in the form of a very fusible Salt, called
Butter of Antimony, although the Spirit of Salt alone be almost as
volatile as Water, and the Antimony alone as fix'd as Lead?

When _Aqua fortis_ dissolves Silver and not Gold, and _Aqua regia_
dissolves Gold and not Silver, may it not be said that _Aqua fortis_ is
subtil enough to penetrate Gold as well as Silver, but wants the
attractive Force to give it Entrance; and that _Aqua regia_ is subtil
enough to penetrate Silver as well as Gold, but wants the attractive
Force to give it Entrance? For _Aqua regia_ is nothing else than _Aqua
fortis_ mix'd with some Spirit of Salt, or with Sal-armoniac; and even
common Salt dissolved in _Aqua fortis_, enables the _Menstruum_ to
dissolve Gold, though the Salt be a gross Body. When therefore Spirit of
Salt precipitates Silver out of _Aqua fortis_, is it not done by
attracting and mixing with the _Aqua fortis_, and not attracting, or
perhaps repelling Silver? And when Water precipitates Antimony out of
the Sublimate of Antimony and Sal-armoniac, or out of Butter of
Antimony, is it not done by its dissolving, mixing with, and weakening
the Sal-armoniac or Spirit of Salt, and its not attracting, or perhaps
repelling the Antimony? And is it not for want of an attractive virtue
between the Parts of Water and Oil, of Quick-silver and Antimony, of
Lead and Iron, that these Substances do not mix; and by a weak
Attraction, that Quick-silver and Copper mix difficultly; and from a
strong one, that Quick-silver and Tin, Antimony and Iron, Water and
Salts, mix readily? And in general, is it not from the same Principle
that Heat congregates homogeneal Bodies, and separates heterogeneal
ones?

When Arsenick with Soap gives a Regulus, and with Mercury sublimate a
volatile fusible Salt, like Butter of Antimony, doth not this shew that
Arsenick, which is a Substance totally volatile, is compounded of fix'd
and volatile Parts, strongly cohering by a mutual Attraction, so that
the volatile will not ascend without carrying up the fixed? And so, when
an equal weight of Spirit of Wine and Oil of Vitriol are digested
together, and in Distillation yield two fragrant and volatile Spirits
which will not mix with one another, and a fix'd black Earth remains
behind; doth not this shew that Oil of Vitriol is composed of volatile
and fix'd Parts strongly united by Attraction, so as to ascend together
in form of a volatile, acid, fluid Salt, until the Spirit of Wine
attracts and separates the volatile Parts from the fixed? And therefore,
since Oil of Sulphur _per Campanam_ is of the same Nature with Oil of
Vitriol, may it not be inferred, that Sulphur is also a mixture of
volatile and fix'd Parts so strongly cohering by Attraction, as to
ascend together in Sublimation. By dissolving Flowers of Sulphur in Oil
of Turpentine, and distilling the Solution, it is found that Sulphur is
composed of an inflamable thick Oil or fat Bitumen, an acid Salt, a very
fix'd Earth, and a little Metal. The three first were found not much
unequal to one another, the fourth in so small a quantity as scarce to
be worth considering. The acid Salt dissolved in Water, is the same with
Oil of Sulphur _per Campanam_, and abounding much in the Bowels of the
Earth, and particularly in Markasites, unites it self to the other
Ingredients of the Markasite, which are, Bitumen, Iron, Copper, and
Earth, and with them compounds Allum, Vitriol, and Sulphur. With the
Earth alone it compounds Allum; with the Metal alone, or Metal and
Earth together, it compounds Vitriol; and with the Bitumen and Earth it
compounds Sulphur. Whence it comes to pass that Markasites abound with
those three Minerals. And is it not from the mutual Attraction of the
Ingredients that they stick together for compounding these Minerals, and
that the Bitumen carries up the other Ingredients of the Sulphur, which
without it would not sublime? And the same Question may be put
concerning all, or almost all the gross Bodies in Nature. For all the
Parts of Animals and Vegetables are composed of Substances volatile and
fix'd, fluid and solid, as appears by their Analysis; and so are Salts
and Minerals, so far as Chymists have been hitherto able to examine
their Composition.

)text"
      R"text(When Mercury sublimate is re-sublimed with fresh Mercury, and becomes
_Mercurius Dulcis_, which is a white tasteless Earth scarce dissolvable
in Water, and _Mercurius Dulcis_ re-sublimed with Spirit of Salt returns
into Mercury sublimate; and when Metals corroded with a little acid turn
into rust, which is an Earth tasteless and indissolvable in Water, and
this Earth imbibed with more acid becomes a metallick Salt; and when
some Stones, as Spar of Lead, dissolved in proper _Menstruums_ become
Salts; do not these things shew that Salts are dry Earth and watry Acid
united by Attraction, and that the Earth will not become a Salt without
so much acid as makes it dissolvable in Water? Do not the sharp and
pungent Tastes of Acids arise from the strong Attraction whereby the
acid Particles rush upon and agitate the Particles of the Tongue? And
when Metals are dissolved in acid _Menstruums_, and the Acids in
conjunction with the Metal act after a different manner, so that the
Compound has a different Taste much milder than before, and sometimes a
sweet one; is it not because the Acids adhere to the metallick
Particles, and thereby lose much of their Activity? And if the Acid be
in too small a Proportion to make the Compound dissolvable in Water,
will it not by adhering strongly to the Metal become unactive and lose
its Taste, and the Compound be a tasteless Earth? For such things as are
not dissolvable by the Moisture of the Tongue, act not upon the Taste.

As Gravity makes the Sea flow round the denser and weightier Parts of
the Globe of the Earth, so the Attraction may make the watry Acid flow
round the denser and compacter Particles of Earth for composing the
Particles of Salt. For otherwise the Acid would not do the Office of a
Medium between the Earth and common Water, for making Salts dissolvable
in the Water; nor would Salt of Tartar readily draw off the Acid from
dissolved Metals, nor Metals the Acid from Mercury. Now, as in the great
Globe of the Earth and Sea, the densest Bodies by their Gravity sink
down in Water, and always endeavour to go towards the Center of the
Globe; so in Particles of Salt, the densest Matter may always endeavour
to approach the Center of the Particle: So that a Particle of Salt may
be compared to a Chaos; being dense, hard, dry, and earthy in the
Center; and rare, soft, moist, and watry in the Circumference. And
hence it seems to be that Salts are of a lasting Nature, being scarce
destroy'd, unless by drawing away their watry Parts by violence, or by
letting them soak into the Pores of the central Earth by a gentle Heat
in Putrefaction, until the Earth be dissolved by the Water, and
separated into smaller Particles, which by reason of their Smallness
make the rotten Compound appear of a black Colour. Hence also it may be,
that the Parts of Animals and Vegetables preserve their several Forms,
and assimilate their Nourishment; the soft and moist Nourishment easily
changing its Texture by a gentle Heat and Motion, till it becomes like
the dense, hard, dry, and durable Earth in the Center of each Particle.
But when the Nourishment grows unfit to be assimilated, or the central
Earth grows too feeble to assimilate it, the Motion ends in Confusion,
Putrefaction, and Death.

If a very small quantity of any Salt or Vitriol be dissolved in a great
quantity of Water, the Particles of the Salt or Vitriol will not sink to
the bottom, though they be heavier in Specie than the Water, but will
evenly diffuse themselves into all the Water, so as to make it as saline
at the top as at the bottom. And does not this imply that the Parts of
the Salt or Vitriol recede from one another, and endeavour to expand
themselves, and get as far asunder as the quantity of Water in which
they float, will allow? And does not this Endeavour imply that they have
a repulsive Force by which they fly from one another, or at least, that
they attract the Water more strongly than they do one another? For as
all things ascend in Water which are less attracted than Water, by the
gravitating Power of the Earth; so all the Particles of Salt which float
in Water, and are less attracted than Water by any one Particle of Salt,
must recede from that Particle, and give way to the more attracted
Water.

When any saline Liquor is evaporated to a Cuticle and let cool, the Salt
concretes in regular Figures; which argues, that the Particles of the
Salt before they concreted, floated in the Liquor at equal distances in
rank and file, and by consequence that they acted upon one another by
some Power which at equal distances is equal, at unequal distances
unequal. For by such a Power they will range themselves uniformly, and
without it they will float irregularly, and come together as
irregularly. And since the Particles of Island-Crystal act all the same
way upon the Rays of Light for causing the unusual Refraction, may it
not be supposed that in the Formation of this Crystal, the Particles not
only ranged themselves in rank and file for concreting in regular
Figures, but also by some kind of polar Virtue turned their homogeneal
Sides the same way.

The Parts of all homogeneal hard Bodies which fully touch one another,
stick together very strongly. And for explaining how this may be, some
have invented hooked Atoms, which is begging the Question; and others
tell us that Bodies are glued together by rest, that is, by an occult
Quality, or rather by nothing; and others, that they stick together by
conspiring Motions, that is, by relative rest amongst themselves. I had
rather infer from their Cohesion, that their Particles attract one
another by some Force, which in immediate Contact is exceeding strong,
at small distances performs the chymical Operations above-mention'd, and
reaches not far from the Particles with any sensible Effect.

All Bodies seem to be composed of hard Particles: For otherwise Fluids
would not congeal; as Water, Oils, Vinegar, and Spirit or Oil of Vitriol
do by freezing; Mercury by Fumes of Lead; Spirit of Nitre and Mercury,
by dissolving the Mercury and evaporating the Flegm; Spirit of Wine and
Spirit of Urine, by deflegming and mixing them; and Spirit of Urine and
Spirit of Salt, by subliming them together to make Sal-armoniac. Even
the Rays of Light seem to be hard Bodies; for otherwise they would not
retain different Properties in their different Sides. And therefore
Hardness may be reckon'd the Property of all uncompounded Matter. At
least, this seems to be as evident as the universal Impenetrability of
Matter. For all Bodies, so far as Experience reaches, are either hard,
or may be harden'd; and we have no other Evidence of universal
Impenetrability, besides a large Experience without an experimental
Exception. Now if compound Bodies are so very hard as we find some of
them to be, and yet are very porous, and consist of Parts which are only
laid together; the simple Particles which are void of Pores, and were
never yet divided, must be much harder. For such hard Particles being
heaped up together, can scarce touch one another in more than a few
Points, and therefore must be separable by much less Force than is
requisite to break a solid Particle, whose Parts touch in all the Space
between them, without any Pores or Interstices to weaken their Cohesion.
And how such very hard Particles which are only laid together and touch
only in a few Points, can stick together, and that so firmly as they do,
without the assistance of something which causes them to be attracted or
press'd towards one another, is very difficult to conceive.

)text"
      R"text(The same thing I infer also from the cohering of two polish'd Marbles
_in vacuo_, and from the standing of Quick-silver in the Barometer at
the height of 50, 60 or 70 Inches, or above, when ever it is well-purged
of Air and carefully poured in, so that its Parts be every where
contiguous both to one another and to the Glass. The Atmosphere by its
weight presses the Quick-silver into the Glass, to the height of 29 or
30 Inches. And some other Agent raises it higher, not by pressing it
into the Glass, but by making its Parts stick to the Glass, and to one
another. For upon any discontinuation of Parts, made either by Bubbles
or by shaking the Glass, the whole Mercury falls down to the height of
29 or 30 Inches.
)text"
  }};
  // clang-format on
  return texts;
}

}  // namespace kvlean::eval
