//! Dates for templates that name today.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Seconds since 1970 began.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or_default()
}

/// A moment in UTC, as Python's `strftime` writes it in English; what it has no rule for stays as it is.
pub fn strftime(format: &str, seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let day_of_year = days - days_of(year, 1, 1) + 1;
    let week_day = DAYS[(days + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let hour12 = (hour + 11) % 12 + 1;
    let mut text = String::new();
    let mut characters = format.chars().peekable();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        // `%-d` is a day without the zero before it.
        let bare = characters.next_if_eq(&'-').is_some();
        let two = |number: i64| if bare { number.to_string() } else { format!("{number:02}") };
        let Some(kind) = characters.next() else {
            text.push_str(if bare { "%-" } else { "%" });
            break;
        };
        let part = match kind {
            'Y' => year.to_string(),
            'y' => two(year.rem_euclid(100)),
            'm' => two(month),
            'd' => two(day),
            'e' => format!("{day:2}"),
            'H' => two(hour),
            'I' => two(hour12),
            'M' => two(minute),
            'S' => two(second),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'j' => {
                if bare {
                    day_of_year.to_string()
                } else {
                    format!("{day_of_year:03}")
                }
            }
            'B' => month_name.to_owned(),
            'b' | 'h' => month_name[..3].to_owned(),
            'A' => week_day.to_owned(),
            'a' => week_day[..3].to_owned(),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'D' => format!("{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
            'R' => format!("{hour:02}:{minute:02}"),
            'Z' => "UTC".to_owned(),
            'z' => "+0000".to_owned(),
            's' => seconds.to_string(),
            '%' => "%".to_owned(),
            other => format!("%{}{other}", if bare { "-" } else { "" }),
        };
        text.push_str(&part);
    }
    text
}

/// Year, month and day of a day counted from the first of 1970, in the Gregorian calendar.
fn civil(days: i64) -> (i64, i64, i64) {
    // Years that begin in March have their leap day at the end.
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (year_of_era + 400 * era + next, month, day)
}

/// The day counted from the first of 1970.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = if month > 2 { month - 3 } else { month + 9 };
    let of_year = (153 * month + 2) / 5 + day - 1;
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python's `datetime.fromtimestamp(seconds, UTC).strftime` gives.
    #[test]
    fn dates_are_those_of_python() {
        let format = "%d %b %Y|%A, %B %-d|%Y-%m-%d %H:%M:%S|%I %p|%j|%a %y %%";
        for (seconds, expected) in [
            (0, "01 Jan 1970|Thursday, January 1|1970-01-01 00:00:00|12 AM|001|Thu 70 %"),
            (951_782_399, "28 Feb 2000|Monday, February 28|2000-02-28 23:59:59|11 PM|059|Mon 00 %"),
            (951_782_400, "29 Feb 2000|Tuesday, February 29|2000-02-29 00:00:00|12 AM|060|Tue 00 %"),
            (1_735_689_599, "31 Dec 2024|Tuesday, December 31|2024-12-31 23:59:59|11 PM|366|Tue 24 %"),
            (4_107_542_400, "01 Mar 2100|Monday, March 1|2100-03-01 00:00:00|12 AM|060|Mon 00 %"),
            (-1, "31 Dec 1969|Wednesday, December 31|1969-12-31 23:59:59|11 PM|365|Wed 69 %"),
        ] {
            assert_eq!(strftime(format, seconds), expected);
        }
    }

    #[test]
    fn days_count_both_ways() {
        for days in (-200_000..200_000).step_by(97) {
            let (year, month, day) = civil(days);
            assert_eq!(days_of(year, month, day), days);
        }
    }
}
