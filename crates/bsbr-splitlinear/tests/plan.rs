//! Which layers are meant, how they are cut and grouped, and what rank they get.

use bsbr_splitlinear::{
    Form, GroupSize, LinearShape, Plan, PlanWarning, RankAllocation, Share, Spectrum, SplitConfig, SplitError,
    allocate, plan,
};
use proptest::prelude::*;

/// The configuration of the Python original, as it is written there.
const NOTEBOOK: &str = r"weight_types:
    attn_c_attn:
        pattern: '.*\.attn\.c_attn$'
        split: heads  # qkv, heads
        qkv_order: qkv  # string
        n_head: 12
    attn_c_proj: 
        pattern: '.*\.attn\.c_proj$'
    mlp_c_fc: 
        pattern: '.*\.mlp\.c_fc$'
    mlp_c_proj: 
        pattern: '.*\.mlp\.c_proj$'

block_pattern: 'h\.(\d+)'
";

fn linear(path: String, inputs: usize, outputs: usize) -> LinearShape {
    LinearShape { path, inputs, outputs, bias: true, fused: Vec::new() }
}

fn gpt2() -> Vec<LinearShape> {
    let layer = |layer: usize| {
        let path = |name: &str| format!("transformer.h.{layer}.{name}");
        [
            linear(path("attn.c_attn"), 768, 2304),
            linear(path("attn.c_proj"), 768, 768),
            linear(path("mlp.c_fc"), 768, 3072),
            linear(path("mlp.c_proj"), 3072, 768),
        ]
    };
    (0..12).flat_map(layer).collect()
}

fn toml(text: &str) -> SplitConfig {
    SplitConfig::from_toml(text).unwrap()
}

fn fails(text: &str, linears: &[LinearShape]) -> String {
    let failure = match SplitConfig::from_toml(text) {
        Ok(config) => plan(&config, linears).unwrap_err(),
        Err(error) => error,
    };
    let source = std::error::Error::source(&failure).map(ToString::to_string).unwrap_or_default();
    format!("{failure} {source}")
}

fn one(extra: &str) -> String {
    format!("block_pattern = 'h\\.(\\d+)'\n[weight_types.attn]\npattern = '.*\\.attn\\.c_attn$'\n{extra}")
}

/// The rank of two factors.
fn rank_for(keep: f64, layers: usize, inputs: usize, outputs: usize, share: Share) -> usize {
    GroupSize { form: Form::TwoFactor, share, layers, inputs, outputs }.rank_for(keep)
}

#[test]
fn ranks_are_the_published_ones() {
    let ranks = |keep, inputs, outputs, layers: &[usize]| {
        layers.iter().map(|&layers| rank_for(keep, layers, inputs, outputs, Share::Input)).collect::<Vec<_>>()
    };
    let to_four = [1, 2, 3, 4];
    assert_eq!(ranks(0.8, 768, 768, &to_four), [307, 409, 460, 491]);
    assert_eq!(ranks(0.5, 768, 768, &to_four), [192, 256, 288, 307]);
    assert_eq!(ranks(0.8, 768, 2304, &to_four), [460, 526, 552, 567]);
    assert_eq!(ranks(0.8, 768, 3072, &to_four), [491, 546, 567, 578]);
    assert_eq!(ranks(0.5, 768, 3072, &to_four), [307, 341, 354, 361]);
    assert_eq!(ranks(0.8, 3072, 768, &[1, 2]), [491, 819]);
    assert_eq!(ranks(0.5, 3072, 768, &to_four), [307, 512, 658, 768]);
    assert_eq!(ranks(0.8, 768, 64, &to_four), [47, 87, 122, 153]);
    assert_eq!(ranks(0.5, 768, 64, &[1, 2, 3, 4, 12]), [29, 54, 76, 96, 192]);
    assert_eq!(ranks(0.8, 4096, 4096, &[2]), [2184]);
    assert_eq!(ranks(1.0, 768, 768, &[2]), [512]);
    assert_eq!(ranks(1.0, 768, 3072, &[2]), [682]);
    assert_eq!(ranks(1.0, 3072, 768, &[2]), [1024]);
    // The output side shared is the transposed weight with its input side shared.
    assert_eq!(rank_for(0.8, 4, 3072, 768, Share::Output), rank_for(0.8, 4, 768, 3072, Share::Input));
}

#[test]
fn rounding_of_the_fraction_kept_costs_no_rank() {
    // 1 - 70 / 100 is a little more than 0.3 and 1 - 0.9 a little less than 0.1: both mean what they say.
    for (keep, written) in [(1.0 - 70.0 / 100.0, 0.3), (1.0 - 0.9, 0.1)] {
        assert_ne!(keep, written);
        assert_eq!(rank_for(keep, 2, 100, 100, Share::None), rank_for(written, 2, 100, 100, Share::None));
    }
    assert_eq!(rank_for(1.0 - 0.9, 1, 100, 100, Share::None), 5);
    assert_eq!(toml(&format!("remove = 20\n{}", one(""))).keep, 0.8);
}

#[test]
fn a_rank_of_pivoted_factors_costs_what_their_numbers_are() {
    // r (in + out - r) numbers and r pivots: by hand for 768 x 768 at 0.8, 423 * (1536 - 423) + 423 = 471,222 of 471,859,
    // and 424 * (1536 - 424) + 424 = 471,912 would be too many.
    for (inputs, outputs, layers, rank) in [
        (768, 768, 1, 423),
        (576, 576, 1, 317),
        (576, 192, 1, 140),
        (576, 1536, 1, 417),
        (1536, 576, 1, 417),
        (768, 768, 2, 532),
    ] {
        let size = GroupSize { form: Form::Pivoted, share: Share::Input, layers, inputs, outputs };
        let numbers = |rank: usize| rank * (inputs - rank) + layers * rank * outputs + rank;
        assert_eq!(size.rank_for(0.8), rank);
        assert_eq!(size.parameters(rank), numbers(rank));
        let allowed = 0.8 * (layers * inputs * outputs) as f64;
        assert!(numbers(rank) as f64 <= allowed && numbers(rank + 1) as f64 > allowed);
        // A matrix that is not cut costs no less than the weight, and multiplications are one less for each pivot.
        assert!(size.parameters(size.largest_rank()) >= size.dense());
        let multiplications = (rank * (inputs - rank) + rank * outputs) as f64;
        assert!((size.flop_ratio(rank) - multiplications / (inputs * outputs) as f64).abs() < 1e-12);
    }
    let message =
        fails(&format!("form = 'pivoted'\n{}", one("share = 'output'")), &[linear("h.0.attn.c_attn".into(), 8, 8)]);
    assert!(message.contains("weight_types.attn.share") && message.contains("pivoted"), "{message}");
}

#[test]
fn gpt2_at_half_its_parameters_in_groups_of_four_has_the_known_size() {
    let yaml = NOTEBOOK.replace("split: heads", "split: qkv") + "group_size: 4\ncompression_rate: 0.5\n";
    let plan = plan(&SplitConfig::from_yaml(&yaml).unwrap(), &gpt2()).unwrap();
    // GPT-2 has 124,439,808 parameters, those of these layers among them.
    let total = 124_439_808 - plan.parameters_before() + plan.parameters_after();
    assert_eq!(total, 81_947_136);
    let ranks = |part: &str| plan.groups.iter().filter(|g| g.part() == part).map(|g| g.rank).collect::<Vec<_>>();
    for part in ["attn_c_attn.q", "attn_c_attn.k", "attn_c_attn.v", "attn_c_proj"] {
        assert_eq!(ranks(part), [Some(307); 3], "{part}");
    }
    assert_eq!(ranks("mlp_c_fc"), [Some(361); 3]);
    assert_eq!(ranks("mlp_c_proj"), [Some(768); 3]);
}

#[test]
fn the_configuration_of_the_original_is_read_as_it_is() {
    let plan = plan(&SplitConfig::from_yaml(NOTEBOOK).unwrap(), &gpt2()).unwrap();
    assert_eq!(plan.linears.len(), 48);
    let parts = &plan.linears[0].parts;
    assert_eq!(parts.len(), 36);
    assert_eq!(parts[0].name, "transformer.h.0.attn.c_attn.q.0");
    assert_eq!((parts[13].name.as_str(), parts[13].columns.clone()), ("transformer.h.0.attn.c_attn.k.1", 832..896));
    assert_eq!(plan.linears[1].parts[0].name, "transformer.h.0.attn.c_proj");
    assert_eq!(plan.groups.len(), (36 + 3) * 6);
    assert_eq!(plan.groups[0].name, "attn_c_attn.q.0.g0");
    // Written otherwise, it is the same.
    let older =
        NOTEBOOK.replace("block_pattern", "layer_pattern").replace("c_proj$'", "c_proj$'\n        split: false");
    assert_eq!(SplitConfig::from_yaml(&older).unwrap(), SplitConfig::from_yaml(NOTEBOOK).unwrap());
}

#[test]
fn a_configuration_survives_being_saved() {
    let text = r"
        groups = [[0, 1], [2]]
        keep = 0.7
        rank = 'drank'
        block_pattern = 'h\.(\d+)'
        [calibration]
        ridge = 0.5
        mode = 'sequential_anchored'
        [weight_types.attn]
        pattern = '.*c_attn$'
        split = 'qkv'
        share = 'output'
    ";
    let config = toml(text);
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(SplitConfig::from_json(&json).unwrap(), config);
}

#[test]
fn the_last_group_has_a_rank_of_its_own() {
    let linears: Vec<_> = (0..12).map(|layer| linear(format!("h.{layer}.mlp.c_fc"), 768, 3072)).collect();
    let config =
        toml("group_size = 5\nkeep = 0.5\nblock_pattern = 'h\\.(\\d+)'\n[weight_types.fc]\npattern = '.*c_fc$'");
    let plan = plan(&config, &linears).unwrap();
    let sizes: Vec<_> = plan.groups.iter().map(|group| group.members.len()).collect();
    assert_eq!(sizes, [5, 5, 2]);
    assert_eq!(plan.groups[2].rank, Some(341));
    assert!(plan.groups[0].rank > plan.groups[2].rank);
}

#[test]
fn layers_are_ordered_by_number_not_by_spelling() {
    let linears: Vec<_> = [10, 2, 0, 1].iter().map(|layer| linear(format!("h.{layer}.mlp.c_fc"), 64, 64)).collect();
    let config = toml("block_pattern = 'h\\.(\\d+)'\n[weight_types.fc]\npattern = '.*c_fc$'");
    let plan = plan(&config, &linears).unwrap();
    let layers = |group: usize| plan.groups[group].members.iter().map(|&(index, _)| plan.linears[index].layer);
    assert_eq!(layers(0).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(layers(1).collect::<Vec<_>>(), [2, 10]);
}

#[test]
fn a_group_that_would_grow_stays_original() {
    // At keep = 1 the rank 512 of two 768 x 768 layers costs exactly what they do.
    let linears: Vec<_> = (0..2).map(|layer| linear(format!("h.{layer}.attn.c_attn"), 768, 768)).collect();
    let plan = plan(&toml(&format!("keep = 1.0\n{}", one(""))), &linears).unwrap();
    assert_eq!(plan.groups[0].rank, None);
    assert_eq!(plan.parameters_after(), plan.parameters_before());
    assert!(matches!(plan.warnings()[..], [PlanWarning::StaysOriginal { groups: 1, .. }]));
}

#[test]
fn sharing_that_costs_time_is_said() {
    // Per head in groups of four: 3.25 times what is kept.
    let yaml = NOTEBOOK.to_owned() + "group_size: 4\nkeep: 0.5\n";
    let plan = plan(&SplitConfig::from_yaml(&yaml).unwrap(), &gpt2()).unwrap();
    let group = &plan.groups[0];
    assert!((group.flop_ratio() - 96.0 * 832.0 / (768.0 * 64.0)).abs() < 1e-12);
    let warned = plan
        .warnings()
        .iter()
        .any(|warning| matches!(warning, PlanWarning::SlowerThanDense { part, .. } if part == "attn_c_attn.q.0"));
    assert!(warned);
}

#[test]
fn patterns_begin_where_the_name_does() {
    let linears = [linear("h.0.c_fc".into(), 64, 64), linear("x.h.0.c_fc".into(), 64, 64)];
    let config =
        |pattern: &str| toml(&format!("block_pattern = 'h\\.(\\d+)'\n[weight_types.a]\npattern = '{pattern}'"));
    let matched = |pattern: &str| plan(&config(pattern), &linears).map(|plan| plan.linears.len());
    assert_eq!(matched("h\\.0").unwrap(), 1);
    assert_eq!(matched("x").unwrap(), 1);
    // Not everywhere in the name, and not only the first of several ways.
    assert!(matches!(matched("c_fc"), Err(SplitError::NoMatch { .. })));
    assert_eq!(matched("c_fc|x").unwrap(), 1);
}

#[test]
fn fewer_key_heads_are_cut_where_they_lie() {
    let mut layer = linear("h.0.attn.c_attn".into(), 576, 960);
    let text = one("split = 'heads'\nn_head = 9\nn_kv_head = 3");
    let check = |layer: &LinearShape| {
        let plan = plan(&toml(&text), std::slice::from_ref(layer)).unwrap();
        let parts = &plan.linears[0].parts;
        assert_eq!(parts.len(), 15);
        assert_eq!((parts[9].label.as_str(), parts[9].columns.clone()), ("k.0", 576..640));
        assert_eq!((parts[14].label.as_str(), parts[14].columns.clone()), ("v.2", 896..960));
    };
    check(&layer);
    layer.fused = vec![('q', 576), ('k', 192), ('v', 192)];
    check(&layer);
    // Without head counts, the model's own widths are enough for three parts.
    let plan = plan(&toml(&one("split = 'qkv'")), &[layer.clone()]).unwrap();
    assert_eq!(plan.linears[0].parts[2].columns, 768..960);
    // Values first.
    layer.fused = vec![('v', 192), ('k', 192), ('q', 576)];
    let text = one("split = 'qkv'\nqkv_order = 'VKQ'");
    let plan = bsbr_splitlinear::plan(&toml(&text), &[layer.clone()]).unwrap();
    assert_eq!(plan.linears[0].parts[2].name, "h.0.attn.c_attn.q");
    // Queries alone may be cut into heads.
    let single = LinearShape { outputs: 576, fused: vec![('q', 576)], ..layer };
    let plan = bsbr_splitlinear::plan(&toml(&one("split = 'heads'\nn_head = 9")), &[single]).unwrap();
    assert_eq!(plan.linears[0].parts[8].name, "h.0.attn.c_attn.q.8");
}

#[test]
fn inconsistencies_name_their_cause() {
    let attn = [linear("h.0.attn.c_attn".into(), 64, 192), linear("h.1.attn.c_attn".into(), 64, 192)];
    let check = |text: &str, words: &[&str]| {
        let message = fails(text, &attn);
        for word in words {
            assert!(message.contains(word), "{message:?} lacks {word:?}");
        }
    };
    check(&one("").replace("c_attn$", "c_atn$"), &["`attn`", "c_atn$", "matches none", "h.0.attn.c_attn"]);
    let two = one("") + "\n[weight_types.other]\npattern = 'h'";
    check(&two, &["h.0.attn.c_attn", "`attn`", "`other`"]);
    check(&one("split = 'qkv'\nqkv_order = 'qqkv'"), &["weight_types.attn.qkv_order", "`qqkv`"]);
    check(&one("qkv_order = 'qqk'"), &["weight_types.attn.qkv_order", "`qqk`"]);
    check(&one("split = 'heads'"), &["weight_types.attn.n_head", "heads"]);
    check(&one("split = 'heads'\nn_head = 5"), &["h.0.attn.c_attn", "5", "192"]);
    check(&one("split = 'heads'\nn_head = 8\nn_kv_head = 3"), &["n_kv_head", "divisor", "8"]);
    check(&one("split = 'heads'\nn_head = 0"), &["weight_types.attn.n_head", "1 or more"]);
    check(&one("split = 'qkv'\nn_kv_head = 1"), &["weight_types.attn.n_head"]);
    check(&one("split = true"), &["true", "`none`, `qkv` or `heads`"]);
    check(&one("split = 'thirds'"), &["thirds", "`qkv`"]);
    check(&one("sharing = 'input'"), &["sharing"]);
    check(&one("share = 'inputs'"), &["inputs"]);
    check(&one("").replace("(\\d+)", "\\d+"), &["block_pattern", "no group"]);
    check(&one("").replace("h\\.(\\d+)", "layer(\\d+)"), &["h.0.attn.c_attn", "layer(\\d+)"]);
    check(&one("").replace("(\\d+)", "(\\D)?"), &["h.0.attn.c_attn", "group"]);
    check(&one("").replace("h\\.(\\d+)", "(h)"), &["h.0.attn.c_attn", "not a number"]);
    check(&one("").replace("(\\d+)", "(\\d+"), &["block_pattern", "regular expression"]);
    check(&one("").replace(".*\\.attn", "(?=x)"), &["weight_types.attn.pattern", "look-around"]);
    check("[weight_types.attn]\npattern = 'h'", &["block_pattern", "nothing"]);
    check("block_pattern = '(h)'\n[weight_types]", &["weight_types", "at least one"]);
    for keep in ["0", "-0.5", "1.5", "nan", "80", "1e-9"] {
        check(&format!("keep = {keep}\n{}", one("")), &["keep"]);
    }
    check(&format!("keep = 0.8\nremove = 20\n{}", one("")), &["remove", "both"]);
    check(&format!("compression_rate = 0.8\nremove = 20\n{}", one("")), &["remove", "both"]);
    check(&format!("keep = 0.8\ncompression_rate = 0.8\n{}", one("")), &["duplicate"]);
    check(&format!("remove = 100\n{}", one("")), &["remove", "below 100"]);
    check(&format!("group_size = 0\n{}", one("")), &["group_size"]);
    check(&format!("group_size = 2\ngroups = [[0, 1]]\n{}", one("")), &["groups", "group_size"]);
    check(&format!("groups = [[0, 1], [1]]\n{}", one("")), &["groups", "layer 1 twice"]);
    check(&format!("groups = [[0]]\n{}", one("")), &["groups", "layer 1"]);
    check(&format!("groups = [[0, 1], [7]]\n{}", one("")), &["groups", "layer 7"]);
    check(&one("groups = [[0, 1, 7]]"), &["weight_types.attn.groups", "layer 7"]);
    check(&format!("groups = [[0, 1], []]\n{}", one("")), &["groups", "empty"]);
    check(&format!("exclude_layers = [5]\n{}", one("")), &["exclude_layers", "layer 5"]);
    check(&one("").replace("[weight_types.attn]", "[weight_types.'a.b']"), &["a.b", "dots"]);
    check(&(one("") + "\n[calibration]\nholdout = 1.0"), &["calibration.holdout"]);
    check(&(one("") + "\n[calibration]\nridge = -1"), &["calibration.ridge"]);
    check(&(one("") + "\n[calibration]\nridge = 'some'"), &["some", "auto"]);
    check(&(one("") + "\n[calibration]\nsamples = 0"), &["calibration.samples"]);
    check(&(one("") + "\n[refit]\nrho = -1.0"), &["refit.rho"]);
    let judged = format!("rank = 'sensitivity'\n{}\n[calibration]\nholdout = 0.0", one(""));
    check(&judged, &["calibration.holdout", "sensitivity"]);
    check(&format!("rank = 'sensitivity'\nobjective = 'weights'\n{}", one("")), &["rank", "weights"]);

    let mut uneven = attn.to_vec();
    uneven[1].outputs = 96;
    let message = fails(&one(""), &uneven);
    assert!(message.contains("h.1.attn.c_attn") && message.contains("h.0.attn.c_attn") && message.contains("64 x 96"));
    let message = fails(&one("split = 'qkv'"), &[linear("h.0.attn.c_attn".into(), 64, 100)]);
    assert!(message.contains("h.0.attn.c_attn") && message.contains("100"), "{message}");
    let fused = LinearShape { fused: vec![('k', 64), ('q', 64), ('v', 64)], ..attn[0].clone() };
    let message = fails(&one("split = 'qkv'"), &[fused]);
    assert!(message.contains("h.0.attn.c_attn") && message.contains("kqv"), "{message}");
    let short = LinearShape { fused: vec![('q', 64)], ..attn[0].clone() };
    assert!(fails(&one("split = 'qkv'"), &[short]).contains("192"));
    let twice = [attn[0].clone(), attn[0].clone()];
    assert!(fails(&one(""), &twice).contains("two linear layers are called `h.0.attn.c_attn`"));
    let same_layer = [attn[0].clone(), linear("h.0.other.attn.c_attn".into(), 64, 192)];
    assert!(fails(&one(""), &same_layer).contains("h.0.other.attn.c_attn"));
    assert!(fails(&one(""), &[]).contains("matches none of the 0"));
}

#[test]
fn excluded_layers_are_left_out_and_named() {
    let linears: Vec<_> = (0..4).map(|layer| linear(format!("h.{layer}.attn.c_attn"), 64, 192)).collect();
    let plan = plan(&toml(&format!("exclude_layers = [0, 3]\n{}", one(""))), &linears).unwrap();
    assert_eq!(plan.excluded, ["h.0.attn.c_attn", "h.3.attn.c_attn"]);
    assert_eq!(plan.groups.len(), 1);
}

fn three_groups() -> Plan {
    let linears: Vec<_> = (0..3).map(|layer| linear(format!("h.{layer}.attn.c_attn"), 40, 40)).collect();
    plan(&toml(&format!("keep = 0.5\n{}", one("share = 'none'"))), &linears).unwrap()
}

fn spectrum(values: Vec<f64>) -> Spectrum {
    Spectrum { energy: values.iter().sum(), values }
}

#[test]
fn marginal_loss_gives_dimensions_to_the_largest_gains() {
    let mut plan = three_groups();
    assert_eq!(plan.groups[0].rank, Some(10));
    let flat = spectrum(vec![1.0; 40]);
    let steep = spectrum((0..40).map(|index| 100.0 * 0.1_f64.powi(index)).collect());
    let none = spectrum(vec![0.0; 40]);
    allocate(&mut plan, &[flat, steep, none], RankAllocation::MarginalLoss).unwrap();
    let ranks: Vec<_> = plan.groups.iter().map(|group| group.rank).collect();
    // The first 20 dimensions' worth makes the flat one whole, which takes all its error away; the rest is left to the
    // steep one.
    assert_eq!(ranks, [None, Some(9), Some(1)]);
}

#[test]
fn parameters_go_to_where_an_error_costs_predictions_most() {
    let linears: Vec<_> = (0..3).map(|layer| linear(format!("h.{layer}.attn.c_attn"), 40, 40)).collect();
    for form in ["two-factor", "pivoted"] {
        let mut plan =
            plan(&toml(&format!("keep = 0.6\nform = '{form}'\n{}", one("share = 'none'"))), &linears).unwrap();
        let budget = plan.parameters_after();
        let rank = plan.groups[0].rank.unwrap();
        let alike = spectrum((0..40).map(|index| 0.85_f64.powi(index)).collect());
        let spectra = [1.0, 0.03, 0.0].map(|loss| alike.scaled(rank, loss));
        let lost = |of: usize, rank: usize| spectra[of].values.iter().skip(rank).sum::<f64>();
        assert!((lost(0, rank) - 1.0).abs() < 1e-12 && (lost(1, rank) - 0.03).abs() < 1e-12 && lost(2, 1) == 0.0);
        // The best of all ranks of the first two and 1 of the last; rank 40 stands for the weights as they are.
        let size = plan.groups[0].size();
        let cost = |rank: usize| if rank == 40 { size.dense() } else { size.parameters(rank).min(size.dense()) };
        let fits = |&(a, b): &(usize, usize)| cost(a) + cost(b) + cost(1) <= budget;
        let all = (1..=40).flat_map(|a| (1..=40).map(move |b| (a, b))).filter(fits);
        let best = all.map(|(a, b)| lost(0, a) + lost(1, b)).fold(f64::MAX, f64::min);
        allocate(&mut plan, &spectra, RankAllocation::Sensitivity).unwrap();
        let ranks: Vec<usize> = plan.groups.iter().map(|group| group.rank.unwrap_or(40)).collect();
        assert!(ranks[0] > ranks[1] && ranks[1] > ranks[2] && plan.parameters_after() <= budget, "{ranks:?}");
        let found = lost(0, ranks[0]) + lost(1, ranks[1]);
        assert!(found <= 1.1 * best, "{form} {ranks:?}: {found}, best {best}");
    }
}

#[test]
fn a_flatter_spectrum_gets_the_square_root_more_dimensions() {
    let mut plan = three_groups();
    let of_rank = |rank: usize| spectrum((0..40).map(|index| f64::from(u8::from(index < rank))).collect());
    assert!((of_rank(16).effective_rank() - 16.0).abs() < 1e-9);
    allocate(&mut plan, &[of_rank(4), of_rank(9), of_rank(25)], RankAllocation::DRank).unwrap();
    let ranks: Vec<_> = plan.groups.iter().map(|group| group.rank.unwrap()).collect();
    // 2 : 3 : 5 of 30 dimensions.
    assert_eq!(ranks, [6, 9, 15]);
}

proptest! {
    #[test]
    fn no_allocation_spends_more_than_the_plan(
        seeds in proptest::collection::vec(proptest::collection::vec(0.0..10.0_f64, 40), 3),
        keep in 0.1..0.95_f64,
        drank in any::<bool>(),
        pivoted in any::<bool>(),
    ) {
        let linears: Vec<_> = (0..3).map(|layer| linear(format!("h.{layer}.attn.c_attn"), 40, 40)).collect();
        let form = if pivoted { "pivoted" } else { "two-factor" };
        let mut plan = plan(&toml(&format!("keep = {keep}\nform = '{form}'\n{}", one("share = 'none'"))), &linears).unwrap();
        let before = plan.parameters_after();
        let spectra: Vec<_> = seeds
            .into_iter()
            .map(|mut values| {
                values.sort_by(|a, b| b.total_cmp(a));
                spectrum(values)
            })
            .collect();
        let how = if drank { RankAllocation::DRank } else { RankAllocation::MarginalLoss };
        allocate(&mut plan, &spectra, how).unwrap();
        prop_assert!(plan.parameters_after() <= before);
        for group in &plan.groups {
            let Some(rank) = group.rank else { continue };
            prop_assert!((1..=40).contains(&rank));
            prop_assert!(group.parameters_after() < group.parameters_before());
        }
    }

    #[test]
    fn no_rank_keeps_more_than_asked(
        keep in 0.01..1.0_f64, layers in 1_usize..6, inputs in 1_usize..300, outputs in 1_usize..300, side in 0..3,
        pivoted in any::<bool>(),
    ) {
        let share = [Share::Input, Share::Output, Share::None][side as usize];
        let layers = if pivoted && share == Share::None { 1 } else { layers };
        let form = if pivoted && share != Share::Output { Form::Pivoted } else { Form::TwoFactor };
        let size = GroupSize { form, share, layers, inputs, outputs };
        let rank = size.rank_for(keep);
        let cost = |rank: usize| {
            let two = rank * match share {
                Share::Input => inputs + layers * outputs,
                Share::Output => layers * inputs + outputs,
                Share::None => layers * (inputs + outputs),
            };
            // A square of the basis is the identity; which rows it is in is one number for each.
            (if form == Form::Pivoted { two - rank * rank + rank } else { two }) as f64
        };
        let allowed = keep * (layers * inputs * outputs) as f64;
        prop_assert!(cost(rank) <= allowed * (1.0 + 1e-9) + 1e-6);
        let limit = if form == Form::Pivoted { inputs.min(layers * outputs) } else { usize::MAX };
        prop_assert!(rank == limit || cost(rank + 1) > allowed);
    }

    #[test]
    fn hostile_configurations_are_refused_without_a_panic(text in ".{0,200}") {
        let _ = SplitConfig::from_toml(&text);
        let _ = SplitConfig::from_yaml(&text);
        let _ = SplitConfig::from_json(&text);
        let _ = SplitConfig::from_toml(&one("").replace(".*", &text));
    }
}
