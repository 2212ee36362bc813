//! Groups through the public functions: what the factors compute, what the report says, what is refused.

use bsbr_splitlinear::{
    Calibration, Form, Group, GroupFactors, Member, Moments, Objective, PairedMoments, Refit, RefitOutcome,
    RefitSettings, Ridge, Share, SolveSettings, Weighting, compress_group, group_spectrum, refit_member,
};
use proptest::prelude::*;

const INPUTS: usize = 12;
const OUTPUTS: usize = 10;

/// Numbers that look normally distributed, the same for the same seed.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x2545_F491_4F6C_DD1D).wrapping_add(0x9E37_79B9);
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32) / (1 << 24) as f32
    };
    (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

/// `[rows, inner] [inner, columns]`, in `f64`.
fn multiply(left: &[f32], right: &[f32], inner: usize, columns: usize) -> Vec<f64> {
    let row = |row: &[f32]| -> Vec<f64> {
        let entry = |column: usize| {
            row.iter().enumerate().map(|(k, &value)| f64::from(value) * f64::from(right[k * columns + column])).sum()
        };
        (0..columns).map(entry).collect()
    };
    left.chunks(inner).flat_map(row).collect()
}

fn single(values: Vec<f64>) -> Vec<f32> {
    values.into_iter().map(|value| value as f32).collect()
}

/// Inputs whose directions differ in strength, turned by `seed`.
fn text(tokens: usize, seed: u64) -> Vec<f32> {
    let mixing: Vec<f32> =
        noise(INPUTS * INPUTS, seed).iter().enumerate().map(|(i, value)| value / (1.0 + (i / INPUTS) as f32)).collect();
    single(multiply(&noise(tokens * INPUTS, seed + 1000), &mixing, INPUTS, INPUTS))
}

fn moments(rows: &[f32]) -> Moments {
    let mut moments = Moments::new(INPUTS);
    moments.add_rows("m", rows).unwrap();
    moments
}

fn paired(original: &[f32], compressed: &[f32]) -> PairedMoments {
    let mut moments = PairedMoments::new(INPUTS);
    moments.add_rows("m", original, compressed).unwrap();
    moments
}

/// `|| X W - Xh F ||^2 / || X W ||^2`.
fn relative_error(original: &[f32], weight: &[f32], seen: &[f32], factored: &[f32]) -> f64 {
    let wanted = multiply(original, weight, INPUTS, OUTPUTS);
    let given = multiply(seen, factored, INPUTS, OUTPUTS);
    let error: f64 = wanted.iter().zip(&given).map(|(a, b)| (a - b) * (a - b)).sum();
    error / wanted.iter().map(|a| a * a).sum::<f64>()
}

fn member<'a>(weight: &'a [f32], fit: &'a Moments, held_out: Option<&'a Moments>) -> Member<'a> {
    let held_out = held_out.map(Calibration::Inputs);
    Member { name: "h.0.c_fc", weight, calibration: Calibration::Inputs(fit), held_out }
}

fn group<'a>(share: Share, rank: usize, members: &'a [Member<'a>]) -> Group<'a> {
    Group { name: "fc.g0", share, form: Form::TwoFactor, inputs: INPUTS, outputs: OUTPUTS, rank, members }
}

fn no_ridge() -> SolveSettings {
    SolveSettings { ridge: Ridge::Relative(0.0), ..SolveSettings::default() }
}

fn off() -> SolveSettings {
    SolveSettings { refit: RefitSettings { c: Refit::Off, ..RefitSettings::default() }, ..SolveSettings::default() }
}

#[test]
fn the_report_measures_what_the_factors_compute() {
    let texts = [text(200, 1), text(200, 2)];
    let fresh = [text(80, 3), text(80, 4)];
    let weights = [noise(INPUTS * OUTPUTS, 5), noise(INPUTS * OUTPUTS, 6)];
    let (fit, held_out) = (texts.each_ref().map(|rows| moments(rows)), fresh.each_ref().map(|rows| moments(rows)));
    let members: Vec<_> = (0..2).map(|i| member(&weights[i], &fit[i], Some(&held_out[i]))).collect();
    for share in [Share::Input, Share::Output] {
        let (factors, report) = compress_group(&group(share, 4, &members), &SolveSettings::default()).unwrap();
        let sides = if share == Share::Input { (INPUTS, OUTPUTS) } else { (OUTPUTS, INPUTS) };
        assert_eq!((factors.basis.len(), factors.coefficients[1].len()), (4 * sides.0, 4 * sides.1));
        assert_eq!((report.parameters_before, report.parameters_after), (240, 4 * (sides.0 + 2 * sides.1)));
        assert!((report.flop_ratio - 4.0 * 22.0 / 120.0).abs() < 1e-12);
        for i in 0..2 {
            let factored = factors.weight(i).unwrap();
            let expected = relative_error(&texts[i], &weights[i], &texts[i], &factored);
            assert!((report.members[i].error - expected).abs() < 1e-5 * expected);
            let expected = relative_error(&fresh[i], &weights[i], &fresh[i], &factored);
            assert!((report.members[i].held_out_error.unwrap() - expected).abs() < 1e-5 * expected);
            assert_eq!(report.members[i].tokens, 200);
            assert_eq!(report.members[i].input_rank, INPUTS);
            assert!(report.members[i].condition.unwrap() > 10.0);
        }
        assert!(factors.weight(2).is_none());
        // The largest number is that of either side.
        let all = factors.coefficients.iter().flatten().chain(&factors.basis);
        assert_eq!(report.largest_factor, all.fold(0.0_f32, |most, value| most.max(value.abs())));
        // Reports are files too.
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<bsbr_splitlinear::GroupReport>(&json).unwrap(), report);
    }
}

#[test]
fn factors_are_balanced_and_always_the_same() {
    let (rows, weight) = (text(300, 1), noise(INPUTS * OUTPUTS, 2));
    let fit = moments(&rows);
    let members = [member(&weight, &fit, None), member(&weight, &fit, None)];
    for (share, count) in [(Share::Input, 2), (Share::Output, 2), (Share::None, 1)] {
        let solve = || compress_group(&group(share, 5, &members[..count]), &no_ridge()).unwrap().0;
        let factors = solve();
        assert_eq!(factors, solve());
        let norm = |values: &[f32]| values.iter().map(|value| value * value).sum::<f32>().sqrt();
        let (basis, own) = (norm(&factors.basis), norm(&factors.coefficients[0]));
        assert!((basis / own - 1.0).abs() < 1e-3, "{basis} {own}");
        // The largest entry of each dimension of the basis is positive.
        for dimension in 0..5 {
            let entries: Vec<f32> = match share {
                Share::Output => factors.basis[dimension * OUTPUTS..][..OUTPUTS].to_vec(),
                _ => factors.basis.iter().skip(dimension).step_by(5).copied().collect(),
            };
            assert!(entries.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap() > 0.0);
        }
        // Neither side has dimensions that are tiny beside others: singular values are halved between them.
        let row_norms: Vec<f32> = match share {
            Share::Output => factors.basis.chunks(OUTPUTS).map(norm).collect(),
            _ => factors.coefficients[0].chunks(OUTPUTS).map(norm).collect(),
        };
        let spectrum = group_spectrum(&group(share, 1, &members[..count]), &no_ridge()).unwrap();
        let expected = (spectrum.values[0] / spectrum.values[4]).powf(0.25);
        assert!((f64::from(row_norms[0] / row_norms[4]) / expected - 1.0).abs() < 1e-3);
    }
}

#[test]
fn a_refit_is_kept_where_other_text_agrees_and_only_there() {
    let weights = [noise(INPUTS * OUTPUTS, 5), noise(INPUTS * OUTPUTS, 6)];
    let fit = [moments(&text(400, 1)), moments(&text(400, 2))];
    let rank = 4;
    let run = |held_out: &[Option<Moments>; 2], settings: &SolveSettings| {
        let members: Vec<_> = (0..2).map(|i| member(&weights[i], &fit[i], held_out[i].as_ref())).collect();
        compress_group(&group(Share::Input, rank, &members), settings).unwrap()
    };
    let like = [Some(moments(&text(100, 1))), Some(moments(&text(100, 2)))];
    let (_, plain) = run(&like, &off());
    assert_eq!(plain.refit.outcome, RefitOutcome::Off);
    let mut once = SolveSettings::default();
    once.refit.alternations = 0;
    let (_, report) = run(&like, &once);
    assert_eq!(report.refit.outcome, RefitOutcome::Accepted);
    assert!((report.refit.before.unwrap() - plain.held_out_error.unwrap()).abs() < 1e-6);
    assert_eq!(report.refit.after, report.held_out_error);
    assert!(report.held_out_error.unwrap() < plain.held_out_error.unwrap());

    // Text on which the other layer's inputs come: what is gained on the one is lost on the other.
    let unlike = [Some(moments(&text(100, 2))), Some(moments(&text(100, 1)))];
    let (factors, report) = run(&unlike, &once);
    assert_eq!(report.refit.outcome, RefitOutcome::Rejected);
    assert_eq!(factors, run(&unlike, &off()).0);

    let (factors, report) = run(&[None, None], &SolveSettings::default());
    assert_eq!((report.refit.outcome, report.held_out_error), (RefitOutcome::NoHeldOut, None));
    assert_eq!(factors, run(&[None, None], &off()).0);

    // Alternating gains more.
    assert!(run(&like, &SolveSettings::default()).1.held_out_error < run(&like, &once).1.held_out_error);
}

#[test]
fn the_ridge_follows_the_number_of_tokens() {
    let weight = noise(INPUTS * OUTPUTS, 5);
    for (tokens, relative) in [(4 * INPUTS - 1, 1e-2), (4 * INPUTS, 1e-3)] {
        let rows = text(tokens, 1);
        let fit = moments(&rows);
        let members = [member(&weight, &fit, None)];
        let (_, report) = compress_group(&group(Share::None, 3, &members), &SolveSettings::default()).unwrap();
        let mean = rows.iter().map(|value| f64::from(value * value)).sum::<f64>() / (tokens * INPUTS) as f64;
        assert!((report.members[0].ridge / (relative * mean) - 1.0).abs() < 1e-5);
    }
    let fit = moments(&text(50, 1));
    let members = [member(&weight, &fit, None)];
    assert_eq!(compress_group(&group(Share::None, 3, &members), &no_ridge()).unwrap().1.members[0].ridge, 0.0);
}

#[test]
fn plain_truncation_looks_at_no_text_but_is_measured_on_it() {
    let (rows, weight) = (text(300, 1), noise(INPUTS * OUTPUTS, 5));
    let fit = moments(&rows);
    let with_text = [member(&weight, &fit, Some(&fit))];
    let without = [Member { calibration: Calibration::Nothing, held_out: None, ..with_text[0] }];
    let plain = SolveSettings { objective: Objective::Weights, ..SolveSettings::default() };
    let (factors, report) = compress_group(&group(Share::None, 4, &with_text), &plain).unwrap();
    assert_eq!(factors, compress_group(&group(Share::None, 4, &without), &SolveSettings::default()).unwrap().0);
    let expected = relative_error(&rows, &weight, &rows, &factors.weight(0).unwrap());
    assert!((report.error - expected).abs() < 1e-5 * expected);
    let (_, aware) = compress_group(&group(Share::None, 4, &with_text), &SolveSettings::default()).unwrap();
    assert!(aware.error < report.error);
    assert_eq!(report.refit.outcome, RefitOutcome::NotNeeded);
}

#[test]
fn pivoted_factors_are_the_same_matrix_in_fewer_numbers() {
    let weights = [noise(INPUTS * OUTPUTS, 5), noise(INPUTS * OUTPUTS, 6)];
    let fit = [moments(&text(200, 1)), moments(&text(200, 2))];
    let members: Vec<_> = (0..2).map(|i| member(&weights[i], &fit[i], Some(&fit[1 - i]))).collect();
    for (share, count) in [(Share::Input, 2), (Share::None, 1)] {
        for rank in 1..OUTPUTS {
            let two = group(share, rank, &members[..count]);
            let (expected, two_report) = compress_group(&two, &SolveSettings::default()).unwrap();
            let pivoted = Group { form: Form::Pivoted, ..two };
            let (factors, report) = compress_group(&pivoted, &SolveSettings::default()).unwrap();
            // One pivot for each dimension, each once, and no entry that would make rounding grow.
            let mut pivots = factors.pivots.clone();
            pivots.dedup();
            assert_eq!(pivots.len(), rank);
            assert!(pivots.is_sorted() && pivots.iter().all(|&pivot| (pivot as usize) < INPUTS));
            assert_eq!(factors.basis.len(), (INPUTS - rank) * rank);
            assert!(factors.basis.iter().all(|value| value.abs() <= 2.0 + 1e-5));
            let numbers = factors.pivots.len() + factors.basis.len() + factors.coefficients.concat().len();
            assert_eq!(report.parameters_after, numbers);
            assert_eq!(report.parameters_after + rank * rank - rank, two_report.parameters_after);
            for member in 0..count {
                let (found, expected) = (factors.weight(member).unwrap(), expected.weight(member).unwrap());
                let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(apart < 1e-5, "{share:?} {rank}: {apart}");
                // The rows of the pivots are the coefficients themselves.
                for (dimension, &pivot) in factors.pivots.iter().enumerate() {
                    let own = &factors.coefficients[member][dimension * OUTPUTS..][..OUTPUTS];
                    assert_eq!(&found[pivot as usize * OUTPUTS..][..OUTPUTS], own);
                }
            }
            assert!((report.error - two_report.error).abs() < 1e-5);
            assert!((report.held_out_error.unwrap() - two_report.held_out_error.unwrap()).abs() < 1e-5);
        }
    }
    // Nothing cut: exact. Nothing there, or nothing shown: finite.
    let whole = Group { form: Form::Pivoted, ..group(Share::None, OUTPUTS, &members[..1]) };
    let (factors, _) = compress_group(&whole, &SolveSettings::default()).unwrap();
    let worst = factors.weight(0).unwrap().iter().zip(&weights[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "{worst}");
    for weight in [vec![0.0; INPUTS * OUTPUTS], vec![1.0; INPUTS * OUTPUTS]] {
        let members = [member(&weight, &fit[0], None)];
        let flat = Group { form: Form::Pivoted, ..group(Share::None, 4, &members) };
        let found = compress_group(&flat, &SolveSettings::default()).unwrap().0.weight(0).unwrap();
        assert!(found.iter().zip(&weight).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?}");
    }
    let shared = Group { form: Form::Pivoted, ..group(Share::Output, 4, &members) };
    assert!(compress_group(&shared, &SolveSettings::default()).unwrap_err().to_string().contains("fc.g0"));
}

#[test]
fn a_rank_beyond_use_is_cut_and_exact() {
    let weight = noise(INPUTS * OUTPUTS, 5);
    let fit = moments(&text(300, 1));
    let members = [member(&weight, &fit, None)];
    for share in [Share::Input, Share::Output, Share::None] {
        let (factors, report) = compress_group(&group(share, 99, &members), &SolveSettings::default()).unwrap();
        assert_eq!((factors.rank, report.rank), (OUTPUTS, OUTPUTS));
        let worst = factors.weight(0).unwrap().iter().zip(&weight).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-5, "{worst}");
    }
}

#[test]
fn degenerate_groups_give_finite_factors() {
    let zero = vec![0.0; INPUTS * OUTPUTS];
    let ones = vec![1.0; INPUTS * OUTPUTS];
    let noise = noise(INPUTS * OUTPUTS, 1);
    let (silent, one_token) = (moments(&[0.0; INPUTS]), moments(&text(1, 1)));
    for weight in [&zero, &ones, &noise] {
        for fit in [&silent, &one_token] {
            for share in [Share::Input, Share::Output] {
                for weighting in [Weighting::Sum, Weighting::Relative] {
                    for ridge in [Ridge::Auto, Ridge::Relative(0.0)] {
                        let members = [member(weight, fit, Some(fit)), member(&zero, fit, Some(fit))];
                        let settings = SolveSettings { weighting, ridge, ..SolveSettings::default() };
                        let (factors, report) = compress_group(&group(share, 6, &members), &settings).unwrap();
                        let all = factors.coefficients.iter().flatten().chain(&factors.basis);
                        assert!(all.into_iter().all(|value| value.is_finite()));
                        assert!(report.error.is_finite() && report.effective_rank.is_finite());
                        assert!(report.members[1].error == 0.0);
                    }
                }
            }
        }
    }
}

/// A layer whose inputs have drifted, as they do behind compressed layers.
fn drifted(rows: &[f32]) -> Vec<f32> {
    let mut mixing: Vec<f32> = noise(INPUTS * INPUTS, 77).iter().map(|value| 0.1 * value).collect();
    (0..INPUTS).for_each(|i| mixing[i * INPUTS + i] += 1.0);
    single(multiply(rows, &mixing, INPUTS, INPUTS))
}

#[test]
fn a_later_layer_is_fitted_to_what_it_will_read() {
    let (rows, fresh) = (text(400, 1), text(120, 1));
    let weights = [noise(INPUTS * OUTPUTS, 5), noise(INPUTS * OUTPUTS, 6)];
    let fit = moments(&rows);
    let (seen, fresh_seen) = (drifted(&rows), drifted(&fresh));
    let (pair, fresh_pair) = (paired(&rows, &seen), paired(&fresh, &fresh_seen));
    for share in [Share::Input, Share::Output] {
        let members = [member(&weights[0], &fit, None), member(&weights[1], &fit, None)];
        let (mut factors, _) = compress_group(&group(share, 7, &members), &SolveSettings::default()).unwrap();
        let before = factors.clone();
        let later = Member {
            calibration: Calibration::Paired(&pair),
            held_out: Some(Calibration::Paired(&fresh_pair)),
            ..members[1]
        };
        let error =
            |factors: &GroupFactors| relative_error(&fresh, &weights[1], &fresh_seen, &factors.weight(1).unwrap());
        let report = refit_member(&mut factors, 1, &later, &SolveSettings::default()).unwrap();
        assert_eq!(report.outcome, RefitOutcome::Accepted);
        assert!((report.before.unwrap() - error(&before)).abs() < 1e-5);
        assert!((report.after.unwrap() - error(&factors)).abs() < 1e-5);
        assert!(error(&factors) < 0.9 * error(&before), "{} {}", error(&factors), error(&before));
        assert_eq!((&factors.basis, &factors.coefficients[0]), (&before.basis, &before.coefficients[0]));

        // Without a judge, or unwanted, nothing changes.
        let unjudged = Member { held_out: None, ..later };
        let mut same = before.clone();
        let outcome = |report: bsbr_splitlinear::RefitReport| report.outcome;
        let report = refit_member(&mut same, 1, &unjudged, &SolveSettings::default()).unwrap();
        assert_eq!(outcome(report), RefitOutcome::NoHeldOut);
        assert_eq!(outcome(refit_member(&mut same, 1, &later, &off()).unwrap()), RefitOutcome::Off);
        assert_eq!(same, before);
        assert!(refit_member(&mut same, 2, &later, &off()).unwrap_err().to_string().contains("2 members"));
    }
}

#[test]
fn anchored_groups_are_nearer_to_the_original_outputs() {
    let (rows, weight) = (text(400, 1), noise(INPUTS * OUTPUTS, 5));
    let seen = drifted(&rows);
    let (fit, pair) = (moments(&rows), paired(&rows, &seen));
    let plain = [member(&weight, &fit, None)];
    let anchored = [Member { calibration: Calibration::Paired(&pair), ..plain[0] }];
    for share in [Share::None, Share::Output] {
        let error = |members: &[Member<'_>]| {
            let (factors, report) = compress_group(&group(share, 7, members), &SolveSettings::default()).unwrap();
            (relative_error(&rows, &weight, &seen, &factors.weight(0).unwrap()), report.error)
        };
        let (anchored_error, reported) = error(&anchored);
        assert!((anchored_error - reported).abs() < 1e-5);
        assert!(anchored_error < 0.8 * error(&plain).0);
    }
}

#[test]
fn what_cannot_be_solved_is_refused_by_name() {
    let weight = noise(INPUTS * OUTPUTS, 5);
    let fit = moments(&text(40, 1));
    let good = member(&weight, &fit, None);
    let refused = |group: Group<'_>, word: &str| {
        let message = compress_group(&group, &SolveSettings::default()).unwrap_err().to_string();
        assert!(message.contains(word), "{message} lacks {word}");
    };
    refused(group(Share::Input, 0, &[good]), "fc.g0");
    refused(group(Share::Input, 2, &[]), "fc.g0");
    refused(group(Share::None, 2, &[good, good]), "fc.g0");
    refused(Group { outputs: 11, ..group(Share::Input, 2, &[good]) }, "h.0.c_fc");
    refused(Group { inputs: usize::MAX, ..group(Share::Input, 2, &[good]) }, "h.0.c_fc");
    let mut broken = weight.clone();
    broken[7] = f32::NAN;
    refused(group(Share::Input, 2, &[Member { weight: &broken, ..good }]), "weight 7 is NaN");
    let narrow = Moments::new(3);
    refused(group(Share::Input, 2, &[Member { calibration: Calibration::Inputs(&narrow), ..good }]), "12 inputs");
    let silent = Moments::new(INPUTS);
    refused(group(Share::Input, 2, &[Member { calibration: Calibration::Inputs(&silent), ..good }]), "no token");
    refused(group(Share::Input, 2, &[Member { held_out: Some(Calibration::Inputs(&silent)), ..good }]), "no token");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn more_dimensions_never_hurt_and_the_spectrum_says_how_much_they_help(seed in 0_u64..1000, output in any::<bool>()) {
        let share = if output { Share::Output } else { Share::None };
        let weight = noise(INPUTS * OUTPUTS, seed);
        let fit = moments(&text(100, seed + 1));
        let members = [member(&weight, &fit, None)];
        let spectrum = group_spectrum(&group(share, 1, &members), &no_ridge()).unwrap();
        for rank in 1..OUTPUTS {
            let (_, report) = compress_group(&group(share, rank, &members), &no_ridge()).unwrap();
            let tail: f64 = spectrum.values[rank..].iter().sum();
            prop_assert!((report.error - tail / spectrum.energy).abs() < 1e-6);
        }
        prop_assert!(spectrum.values.windows(2).all(|pair| pair[0] >= pair[1]));
    }
}
